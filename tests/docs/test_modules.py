"""The pages name every module of moss_train, data_pipeline and tools: a reader finds each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import REPO

PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]  # not docs/notes
MODULES = sorted(
    path.relative_to(REPO)
    for package in ("moss_train", "data_pipeline", "tools")
    for path in (REPO / package).rglob("*.py")
    if path.name != "__init__.py"
)


def is_named(module: Path, text: str) -> bool:
    """By its path, its file name, or its dotted name."""
    dotted = ".".join(module.with_suffix("").parts).removesuffix(".__main__")
    names = [dotted] if module.name == "__main__.py" else [dotted, module.name]
    return any(re.search(rf"(?<![\w.]){re.escape(name)}\b", text) for name in names)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_the_pages_name_the_module(module: Path) -> None:
    assert any(is_named(module, page.read_text()) for page in PAGES)


def test_a_part_of_another_name_does_not_count() -> None:
    assert not is_named(Path("tools/shards/find.py"), "see refind.py and tools.shards.finder")
    assert is_named(Path("tools/shards/find.py"), "`find.py` finds sources")
    assert is_named(Path("tools/shards/__main__.py"), "python -m tools.shards ls")
