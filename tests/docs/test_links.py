"""Every link of the README and of the pages leads to a file that is there, or to a heading; every
test that they name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import REPO

PAGES = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
LABEL = re.compile(r"\[(?:docs/)?([\w-]+\.md)\]\((?:[\w./-]*/)?([\w-]+\.md)?")
TEST = re.compile(r"`(?:[\w/]+/)?(test_\w+)(?:\.py)?`")
DEFINED = re.compile(r"^(?:async )?def (test_\w+)", re.MULTILINE)
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    titles = (title.strip().lower() for title in HEADING.findall(page))
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def broken(page: Path) -> list[str]:
    """Links of a page to files or headings that do not exist; those to the web are not followed."""
    found = []
    for link in LINK.findall(page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_a_link_that_names_a_page_leads_to_it(page: Path) -> None:
    links = LABEL.findall(page.read_text())
    assert [link for link in links if link[0] != (link[1] or page.name)] == []


def test_every_test_that_a_page_names_is_there() -> None:
    files = list((REPO / "tests").rglob("test_*.py"))
    known = {file.stem for file in files}
    known |= {name for file in files for name in DEFINED.findall(file.read_text())}
    named = {name for page in PAGES for name in TEST.findall(page.read_text())}
    assert len(named) > 50
    assert named - known == set()


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `title`, two\n[a](#a-title-two) [b](page.md#a) [c](no.md) [d](https://x.y)"
    )
    assert broken(page) == ["page.md#a", "no.md"]
