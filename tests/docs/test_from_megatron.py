"""docs/from-megatron.md: each row's command runs and prints what its last column says."""

from __future__ import annotations

import re

import pytest

from tests.conftest import REPO
from tests.docs.commands import make_checkout, run

PAGE = REPO / "docs" / "from-megatron.md"
CELL = re.compile(r"(?<!\\)\|")
PREPARE = "python -m data_pipeline.toy toy_world --train 16 --heldout 4 --stages sft"


def rows() -> list[tuple[str, str, str]]:
    """(what you know, command, what it prints) of each row of the page's tables."""
    found = []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in CELL.split(line)[1:-1]]
        if len(cells) == 4 and cells[2].startswith("`"):
            command, printed = (cell.strip("`").replace("\\|", "|") for cell in cells[2:])
            found.append((cells[0], command, printed))
    return found


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each command of the page prints; one that several rows share runs once."""
    checkout = make_checkout(tmp_path_factory.mktemp("page"))
    assert PREPARE in PAGE.read_text()
    run(PREPARE, checkout)
    return {command: run(command, checkout) for command in dict.fromkeys(c for _, c, _ in rows())}


def test_the_page_has_its_rows() -> None:
    assert len(rows()) >= 25


@pytest.mark.parametrize(("known", "command", "expected"), rows())
def test_the_command_of_a_row_prints_what_the_row_says(
    printed: dict[str, str], known: str, command: str, expected: str
) -> None:
    assert expected in printed[command], f"{known}: {command}\n{printed[command][-2000:]}"
