"""docs/first_steps.ipynb runs from first to last cell, and is committed with its outputs."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import REPO

NOTEBOOK = REPO / "docs" / "first_steps.ipynb"
Cells = dict[str, Any]  # first line of a code cell -> the cell


def code_cells(notebook: Any) -> Cells:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return {cell.source.splitlines()[0]: cell for cell in cells}


def printed(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def result_types(cell: Any) -> set[str]:
    return {kind for output in cell.outputs for kind in output.get("data", {})}


def losses(cells: Cells) -> tuple[float, float]:
    found = re.search(r"loss ([\d.]+) -> ([\d.]+)", printed(cells[RUN]))
    assert found
    return float(found[1]), float(found[2])


RUN = "run = moss_train.train(config, quiet=True)"
ASK = "with run.model() as model:"
WATCH = "from data_pipeline.toy.stream import NARRATE"


@pytest.fixture(scope="module")
def committed() -> Cells:
    return code_cells(nbformat.read(NOTEBOOK, as_version=4))


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Cells:
    """In a new kernel, whose settings are those of a fresh machine."""
    folder: Path = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in code_cells(notebook).values():
        cell.outputs, cell.execution_count = [], None
    homes = ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")
    settings = {name: str(folder / name.lower()) for name in homes}
    environment = os.environ | settings | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    environment.pop("RANK", None)
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=environment)
    return code_cells(notebook)


def test_every_cell_is_committed_with_what_it_printed(committed: Cells) -> None:
    counts = [cell.execution_count for cell in committed.values()]
    assert counts == list(range(1, len(committed) + 1))
    outputs = [output for cell in committed.values() for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert "image/png" in result_types(committed["run.plot()"])


def test_training_learns_as_the_committed_outputs_say(committed: Cells, executed: Cells) -> None:
    first, last = losses(executed)
    assert last < first / 4
    assert losses(committed) == (pytest.approx(first, rel=0.05), pytest.approx(last, rel=0.5))
    assert "image/png" in result_types(executed["run.plot()"])


def test_the_model_answers_and_watches(executed: Cells) -> None:
    assert re.search(r"answer:   \w", printed(executed[ASK]))
    lines = printed(executed[WATCH]).splitlines()
    assert lines
    assert all(re.match(r"second \d+: \w", line) for line in lines)
