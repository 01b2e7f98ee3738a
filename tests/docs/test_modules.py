"""The documentation names every module: what is in no page is found by nobody."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PACKAGES = ("data_pipeline", "moss_train", "inference", "tools", "launch")
NAME = re.compile(r"[\w./-]+")
PACKAGE = re.compile(r"#+ `?(\w+)/?`?, file by file")
ROOM = re.compile(r"\| \*\*(\w+/)\*\*")


def modules(root: Path) -> list[str]:
    """Paths of modules, but for `__init__.py`."""
    files = [file for package in PACKAGES for file in sorted((root / package).rglob("*.py"))]
    return [str(file.relative_to(root)) for file in files if file.name != "__init__.py"]


def named(page: str) -> set[str]:
    """Names of modules in a page: paths, ends of paths, dotted names.

    Tables of a room name its files alone: below a heading `## PACKAGE, file by file`, and below a
    row `**ROOM/**` of such a table, `step.py` is PACKAGE/ROOM/step.py.
    """
    names: set[str] = set()
    package = room = ""
    for line in page.splitlines():
        if line.startswith("#"):
            heading = PACKAGE.match(line)
            package, room = (heading[1] + "/" if heading else ""), ""
        elif row := ROOM.match(line):
            room = row[1]
        words = {word.strip(".") for word in NAME.findall(line)}
        names |= words | {f"{package}{room}{word}" for word in words if package}
    return names


def unnamed(paths: list[str], pages: list[str]) -> list[str]:
    """Paths that no page names.

    A name is a path's end (`train/step.py`, or `step.py` where no other file is called so), or the
    module's dotted name as it is run and imported (`tools.shards`, `moss_train.train.step`).
    """
    words = set().union(*map(named, pages))
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
    assert unnamed(modules(REPO), [page.read_text() for page in pages]) == []


def test_a_name_must_tell_a_file_from_others_of_the_same_name() -> None:
    paths = ["a/report.py", "b/report.py", "a/step.py", "tools/shards/__main__.py"]
    pages = ["`b/report.py`, `step.py`; python -m tools.shards."]
    assert unnamed(paths, pages) == ["a/report.py"]
    assert unnamed(paths, ["report.py, mistep.py"]) == paths
    table = "## a, file by file\n| `report.py` |\n| **c/** |\n| `report.py` |"
    assert unnamed(["a/report.py", "b/report.py", "a/c/report.py"], [table]) == ["b/report.py"]
