"""The documentation names every module: what is in no page is found by nobody."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PACKAGES = ("data_pipeline", "moss_train", "inference", "tools", "launch")
NAME = re.compile(r"[\w./-]+")


def modules(root: Path) -> list[str]:
    """Paths of modules, but for `__init__.py`."""
    files = [file for package in PACKAGES for file in sorted((root / package).rglob("*.py"))]
    return [str(file.relative_to(root)) for file in files if file.name != "__init__.py"]


def unnamed(paths: list[str], text: str) -> list[str]:
    """Paths that a text does not name.

    A name is a path's end (`train/step.py`, or `step.py` where no other file is called so), or the
    module's dotted name as it is run and imported (`tools.shards`, `moss_train.train.step`).
    """
    words = set(NAME.findall(text))
    words |= {word.strip(".") for word in words}
    files = Counter(Path(path).name for path in paths)
    missing = []
    for path in paths:
        parts = path.split("/")
        least = 1 if files[parts[-1]] == 1 else 2
        names = {"/".join(parts[-n:]) for n in range(least, len(parts) + 1)}
        dotted = path.removesuffix(".py").replace("/", ".")
        names |= {dotted, dotted.removesuffix(".__main__")}
        if not names & words:
            missing.append(path)
    return missing


def test_every_module_is_named_in_a_page_or_in_the_readme() -> None:
    pages = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages)
    assert unnamed(modules(REPO), text) == []


def test_a_name_must_tell_a_file_from_others_of_the_same_name() -> None:
    paths = ["a/report.py", "b/report.py", "a/step.py", "tools/shards/__main__.py"]
    assert unnamed(paths, "`b/report.py`, `step.py`; python -m tools.shards.") == ["a/report.py"]
    assert unnamed(paths, "report.py, mistep.py") == paths
