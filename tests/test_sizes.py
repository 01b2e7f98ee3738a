"""Files and functions stay short enough to be read at one go."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from statistics import median

REPO = Path(__file__).resolve().parent.parent
FOLDERS = ("data_pipeline", "moss_train", "inference", "tools", "launch", "tests")
FILE_LINES, MEDIAN_LINES, FUNCTION_LINES = 400, 130, 60
REASON = "# Long:"  # a comment above a function's `def` or decorators: why it is one piece


def sources(root: Path) -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]


def long_files(root: Path) -> list[str]:
    """Files of more than 400 lines."""
    counts = {path: len(path.read_text().splitlines()) for path in sources(root)}
    return [f"{path.relative_to(root)}: {n} lines" for path, n in counts.items() if n > FILE_LINES]


def long_functions(root: Path) -> Iterator[str]:
    """Functions of more than 60 lines, without their docstrings, that do not say why."""
    for path in sources(root):
        text = path.read_text()
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            assert node.end_lineno is not None
            count = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                count -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            above = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 2
            if count > FUNCTION_LINES and not lines[above].lstrip().startswith(REASON):
                yield f"{path.relative_to(root)}: {node.name} has {count} lines"


def test_files_have_at_most_400_lines_and_half_of_them_fewer_than_130() -> None:
    assert long_files(REPO) == []
    lengths = [len(path.read_text().splitlines()) for path in sources(REPO)]
    assert median(n for n in lengths if n > 1) < MEDIAN_LINES


def test_functions_have_at_most_60_lines() -> None:
    assert list(long_functions(REPO)) == []


def test_what_is_too_long_is_found(tmp_path: Path) -> None:
    body = "    x = 1\n" * 60
    reason = "# Long: one table.\n@cached\n"
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/a.py").write_text(
        f'def f():\n{body}\ndef g():\n    """Says\n    much."""\n{body[:-10]}\n'
        f"{reason}def h():\n{body}" + "y = 1\n" * 250
    )
    assert long_files(tmp_path) == ["tools/a.py: 438 lines"]
    assert list(long_functions(tmp_path)) == ["tools/a.py: f has 61 lines"]
