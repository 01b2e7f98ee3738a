"""The table of stages in docs/training.md says what conf/stage says."""

from __future__ import annotations

import pytest
import yaml

from tests.conftest import REPO

STAGES = sorted((REPO / "conf/stage").glob("*.yaml"))
TRAINED = {"projector": ["projector.*"], "all": ["*"]}


def rows() -> dict[str, list[str]]:
    """Cells behind the name of each stage."""
    page = (REPO / "docs/training.md").read_text()
    table = page[page.index("| `stage=` |") :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table]
    return {name: rest for name, *rest in cells}


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_a_stage_is_documented_as_it_is(path) -> None:
    stage = yaml.safe_load(path.read_text())
    trained, mixture, prompt = rows()[path.stem]
    assert TRAINED[trained] == [*stage["train"], *stage["also"]]
    assert mixture == " / ".join(str(stage["mixture"][name]) for name in ("text", "image", "video"))
    assert prompt == stage["prompt"]


def test_the_table_has_the_stages_of_conf_alone() -> None:
    assert rows().keys() == {path.stem for path in STAGES}
