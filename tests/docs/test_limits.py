"""The table of the server's limits (docs/serving.md) has all of them, their defaults, and where
each is enforced."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from inference.serve.flags import parse
from inference.serve.limits import Limits

REPO = Path(__file__).resolve().parents[2]


def rows() -> dict[str, list[str]]:
    """Cells of the rows whose first cell begins with a name in backticks, by that name."""
    page = (REPO / "docs/serving.md").read_text()
    table = page[page.index("| limit | default |") :].split("\n\n")[0]
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return {row[0].split("`")[1]: row for row in cells if row[0].startswith("`")}


def number(cell: str) -> float:
    value, unit = (cell.replace(",", "").strip() + " ").split(" ", 1)
    return float(value) * (2**20 if unit.strip() == "MiB" else 1)


@pytest.mark.parametrize("name", [entry.name for entry in fields(Limits)])
def test_a_limit_is_documented_as_it_is(name: str) -> None:
    _, default, flag, where = rows()[name]
    assert number(default) == getattr(Limits(), name)
    assert hasattr(parse(["--checkpoint", "x"]), f"limit_{name}") is (flag.strip() == "yes")
    files = [REPO / "inference" / path for path in re.findall(r"`([\w/]+\.py)`", where)]
    assert any(f"limits.{name}" in file.read_text() for file in files)
