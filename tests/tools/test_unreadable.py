"""Paths that the system refuses to look up (a name that is too long; a folder of somebody else's
would say the same in other words): each command ends with a line that names them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline import build
from data_pipeline.toy import __main__ as toy
from inference.bench import __main__ as bench
from moss_train.train import report
from tools import convert_checkpoint, runs, verify_checkpoint
from tools.data import __main__ as data
from tools.evaluate import __main__ as evaluate
from tools.shards import __main__ as shards

Main = Callable[[list[str]], int]
LONG = "a" * 300  # a file's name has at most 255 bytes
COMMANDS: dict[str, tuple[Main, list[str]]] = {
    "build": (build.main, ["PATH", "OUT"]),
    "data": (data.main, ["import", "PATH", "OUT"]),
    "toy": (toy.main, ["PATH"]),
    "shards": (shards.main, ["validate", "PATH"]),
    "runs": (runs.main, ["compare", "PATH"]),
    "report": (report.main, ["PATH"]),
    "convert": (convert_checkpoint.main, ["hf-to-megatron", "PATH", "OUT"]),
    "verify": (verify_checkpoint.main, ["--megatron", "PATH", "--hf", "PATH"]),
    "evaluate": (evaluate.main, ["--checkpoint", "PATH"]),
    "suite": (evaluate.main, ["--checkpoint", "OUT", "--suite", "PATH"]),
}


def refused(path: Path, said: str) -> None:
    assert len(said.splitlines()) == 1
    assert f"error: {path}" in said
    assert "File name too long" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_names_the_path(name: str, tmp_path: Path, capsys) -> None:
    main, words = COMMANDS[name]
    path, out = tmp_path / LONG, tmp_path / "out"
    assert main([str({"PATH": path, "OUT": out}.get(word, word)) for word in words]) in (1, 2)
    refused(path, capsys.readouterr().err)


def test_a_measurement_names_the_path(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "offline", "--checkpoint", str(tmp_path / LONG)])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 1
    refused(tmp_path / LONG, capsys.readouterr().err)
