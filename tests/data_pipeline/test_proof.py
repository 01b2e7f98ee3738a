"""A kernel is used where it computes what plain torch does, and nowhere else."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch

from data_pipeline.proof import Proofs

CPU = torch.device("cpu")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "kernel.py"
    file.write_text("first")
    return file


def proofs(source: Path, **packages: str) -> Proofs:
    return Proofs(CPU, [source], packages, source.parent / "cache")


def numbers(*values: float, dtype: torch.dtype = torch.float32):
    return lambda: torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("ours", "says"),
    [
        (numbers(1, 2.1), "case 0: differs by 1.0e-01"),
        (numbers(1, float("nan")), "case 0: differs by nan"),
        (numbers(1, 2, 3), r"case 0: \(3,\) torch.float32, not \(2,\)"),
        (numbers(1, 2, dtype=torch.float64), "float64"),
        (lambda: torch.tensor([1.0])[3], "IndexError"),
    ],
)
def test_one_that_is_wrong_is_refused_each_time(source: Path, ours, says: str, caplog) -> None:
    for _ in range(2):
        caplog.clear()
        assert not proofs(source).right("sum", [(ours, numbers(1, 2))])
        (line,) = caplog.messages
        assert line.startswith("kernel sum: plain torch is used instead: ")
        assert caplog.records[0].levelno == logging.WARNING
        assert re.search(says, line)


def test_one_that_is_right_is_computed_once(source: Path, caplog) -> None:
    def never():
        raise AssertionError("computed again")

    assert proofs(source).right("sum", [(numbers(1, 2.00001), numbers(1, 2))])
    assert proofs(source).right("sum", [(never, never)])
    assert not proofs(source).right("product", [(never, never)])
    assert not proofs(source, triton="2").right("sum", [(never, never)])
    source.write_text("second")
    assert not proofs(source).right("sum", [(never, never)])
    assert len(caplog.messages) == 3


def test_a_record_that_cannot_be_kept_or_read_does_no_harm(source: Path) -> None:
    record = proofs(source)
    record.file.parent.mkdir()
    record.file.write_text("{not json")
    assert record.right("sum", [(numbers(1), numbers(1))])
    record.file.unlink()
    record.file.mkdir()  # nothing can be written there
    assert record.right("sum", [(numbers(1), numbers(1))])
