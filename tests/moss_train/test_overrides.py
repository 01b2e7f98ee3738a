"""What people type for a path is that path, and what Hydra cannot read is refused with the spelling
that it reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moss_train.compose import load_config
from moss_train.config import Config, ConfigError
from tests.torchrun import REPO

PATHS = [
    "epoch=3-step=2", "my run (1)", "模型", "прогон", "a,b", "a#1", "50%", "[x]", "{a: b}", "a:b",
    "it's", 'say "x"', "back\\", "a\\'b", " blank ", "@home", "a;b", "null.d", "true", "1e-4",
]  # fmt: skip


def composed(*overrides: str) -> Config:
    return load_config("sft", model="toy", overrides=overrides)


def test_paths_are_taken_as_they_are():
    fields = {
        "init_from": lambda c: c.init_from,
        "run.dir": lambda c: c.run.dir,
        "data.tokenizer": lambda c: c.data.tokenizer,
        "trainer.resume": lambda c: c.trainer.resume,
        "+model.init.from_llama": lambda c: c.model.init.from_llama,
    }
    for path in PATHS:
        config = composed(*(f"{field.lstrip('+')}=/x/{path}" for field in fields))
        for field, value in fields.items():
            assert value(config) == f"/x/{path}", field
    assert composed("init_from=a=b").init_from == "a=b"
    assert composed("init_from=null").init_from is None
    # What is in Hydra's quotes already, as its documentation has it, is not quoted twice.
    assert composed("init_from='a=b'", 'run.dir="c=d"').run.dir == "c=d"


def test_the_home_folder_stands_for_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of me")
    sources = "data.sources=[{name: a, path: ~/d, modality: text}]".replace("~/d", "'~/d'")
    config = composed("run.dir=~/r", "init_from='~/i'", "data.tokenizer=~", sources)
    assert (config.run.dir, config.init_from) == ("/home/of me/r", "/home/of me/i")
    assert (config.data.tokenizer, config.data.sources[0].path) == ("/home/of me", "/home/of me/d")
    assert composed("run.dir=./~/r").run.dir == "./~/r"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("run.dir=", "run.dir=: is empty (an unset variable?): give a path"),
        ("adapter=null", "adapter=null: choose one of lora, none"),
        ("logger=null", "logger=null: choose one of"),
        ("logger.project=~x", "put the value in quotes: 'logger.project=\"~x\"'"),
        ("logger.project=a=b", "put the value in quotes: 'logger.project=\"a=b\"'"),
        ("logger.project=проект (1)", "put the value in quotes: 'logger.project=\"проект (1)\"'"),
        ("logger.project=a,b", "a list is 'logger.project=[a,b]', a text is"),
        ("data.sources[0].weight=3", "one element of a list cannot be set"),
        (
            'optimizer.lr_multipliers={"vision.*": 0.1}',
            "write 'optimizer.lr_multipliers={vision.*: 0.1}'",
        ),
        ("data.sources={name: a, path: x, modality: text}", "data.sources: is a list"),
        ("steps", "steps: must be FIELD=VALUE"),
    ],
)
def test_errors_name_place_and_spelling(override, says):
    with pytest.raises(ConfigError) as caught:
        composed(override)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_spellings_that_are_proposed_are_read():
    config = composed(
        'logger.project="~x"', "optimizer.lr_multipliers={vision.*: 0.1}",
    )  # fmt: skip
    assert config.logger.project == "~x"
    assert config.optimizer.lr_multipliers == {"vision.*": 0.1}


def test_the_command_says_so_in_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "moss_train", "model=toy", "hardware=cpu"]
    for arguments, says in (
        (["adapter=null", "run.dir="], ["adapter=null: choose", "run.dir=: is empty"]),
        (["logger.project=a=b"], ["put the value in quotes"]),
    ):
        made = subprocess.run(
            [*command, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": str(REPO)},
        )  # fmt: skip
        lines = made.stderr.splitlines()
        assert made.returncode == 2
        assert len(lines) == len(says)
        assert all(part in line for part, line in zip(says, lines, strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
