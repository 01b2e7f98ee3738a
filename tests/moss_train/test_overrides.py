"""What people type for a path is that path, and what Hydra cannot read is refused with the spelling
that it reads."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moss_train.compose import load_config, run_command_line
from moss_train.config import Config, ConfigError
from moss_train.overrides import as_typed
from moss_train.presets import conf_dir
from moss_train.validate import _paths
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
        ("logger.project=a,b", "a text with commas is 'logger.project='a,b''"),
        ("stage.train=a,b", "a list is 'stage.train=[a,b]'"),
        ("data.sources[0].weight=3", "one element of a list cannot be set"),
        (
            'optimizer.lr_multipliers={"vision.*": 0.1}',
            "write 'optimizer.lr_multipliers={vision.*: 0.1}'",
        ),
        ("data.sources={name: a, path: x, modality: text}", "data.sources: must be a list"),
        ("stage.train=vision.*", "must be a list in brackets, [..., ...]: write [vision.*]"),
        ("trainer.steps=1e3", "trainer.steps=1000.0: must be a whole number or null: write 1000"),
        ("trainer.async_save=maybe", "trainer.async_save=maybe: must be true or false"),
        ("data.audit=2", "data.audit=2: must be true or false"),
        ("trainer.async_save=-1", "trainer.async_save=-1: must be true or false"),
        ("run.dir=null", "run.dir=null: must be a text"),
        ("model.text.cross_attention_layers=[1,a]", "layers[1]=a: must be a whole number"),
        ("data.sources=[a]", "data.sources[0]=a: must be {name: ..., path: ..., modality: ..., "),
        ("data.sources=[{nme: a}]", "data.sources[...] or data.eval_sources[...].nme: is not a"),
        ("Trainer.steps=3", "Trainer: is not a field: did you mean trainer?"),
        ("text.hidden_size=3", "did you mean stage.mixture.text or model.text?"),
        ("lr=3", "lr: is not a field: did you mean stage.lr or optimizer.lr?"),
        ("trainer.steps =3", "no blank may stand before the =: write trainer.steps=3"),
        ("--trainer.steps=3", "fields have no dashes before them: write trainer.steps=3"),
        ("recipe=toy_stf", "recipe=toy_stf: choose one of toy_pt1, toy_pt2, toy_realtime_sft, "),
        ("+recipe=toy_stf", "+recipe=toy_stf: choose one of toy_pt1, toy_pt2"),
        ("~data", "~data: choose one of shards, toy"),
        ("~trainer.steps", "a field cannot be left out: set it, trainer.steps=..."),
        ("+stage=pt2", "+stage=pt2: stage has a value: write stage=pt2"),
        ("hydra.run.dir=x", "the run folder is run.dir: write run.dir=x"),
        ("hydra.job.chdir=true", "is a setting of Hydra's, and the job takes none: leave it out"),
        ("-m", "one command is one run: for several write a loop: for x in 1 2; do ... trainer"),
        ("--multi", "one command is one run"),
        ("hydra.mode=MULTIRUN", "one command is one run"),
        ("hydra/launcher=submitit_slurm", "one command is one run"),
        (
            "optimizer.lr=1e-4,2e-4",
            "for x in 1e-4 2e-4; do ... optimizer.lr=$x run.dir=runs/lr-$x; done",
        ),
        ("stage=pt1,pt2", "for x in pt1 pt2; do ... stage=$x run.dir=runs/stage-$x; done"),
        ("trainer.seed=choice(1, 2)", "for x in 1 2; do ... trainer.seed=$x run.dir=runs/seed-$x"),
        (
            "trainer.steps=${trainer.step}",
            "${trainer.step}: is not a field: did you mean trainer.st",
        ),
        ("logger.project=${oc.env:NO_SUCH}", "${oc.env:NO_SUCH}: the environment has no variable"),
        ("stage.train=[a", "stage.train=[a: a bracket is not closed (in a text: 'stage.train='[a'"),
        ("trainer.seed=range(1,3)", "one command is one run"),
        ("steps", "steps: must be FIELD=VALUE"),
        ("logger=[wandb,tensorboard]", "one preset of logger is taken: choose one of none, tens"),
        ("stage=[pt1,sft]", "single fields are set behind it, stage.FIELD=..."),
    ],
)
def test_errors_name_place_and_spelling(override, says):
    with pytest.raises(ConfigError) as caught:
        composed(override)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_url_is_no_folder_of_a_run():
    """A folder named s3: would be made."""
    config = composed("run.dir=s3://b/x", "init_from=hf://m", "data.tokenizer=file:///t")
    says = "is a URL: give a folder (only data.sources may be URLs)"
    fields = ("init_from=hf://m", "data.tokenizer=file:///t", "run.dir=s3://b/x")
    assert sorted(_paths(config)) == sorted(f"{field}: {says}" for field in fields)


def test_a_switch_takes_what_yaml_takes_for_one():
    for said, wanted in (("1", True), ("on", True), ("TRUE", True), ("0", False), ("no", False)):
        assert composed(f"data.audit={said}").data.audit is wanted
    with pytest.raises(ConfigError, match=r"^data\.audit=2: must be true or false$"):
        load_config("sft", model="toy", data={"audit": 2})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "trian: [x]",
            "conf/stage/own.yaml: stage.trian: is not a field: did you mean stage.train?",
        ),
        ("lr: fast", "conf/stage/own.yaml: stage.lr=fast: must be a number"),
        ("name: a\n lr: 1", "mapping values are not allowed here in"),
        ("name: a\nname: b", "found duplicate key name"),
    ],
)
def test_an_error_in_a_preset_names_its_file(tmp_path: Path, monkeypatch, text: str, says: str):
    shutil.copytree(conf_dir(), tmp_path / "conf")
    (tmp_path / "conf/stage/own.yaml").write_text(text)
    monkeypatch.setattr("moss_train.compose.conf_dir", lambda: tmp_path / "conf")
    with pytest.raises(ConfigError) as caught:
        load_config("own", model="toy")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "own.yaml" in str(caught.value)


def test_a_folder_of_own_presets_has_recipes_too(tmp_path: Path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe/mine.yaml").write_text("")
    for flag in (["--config-dir", str(tmp_path)], [f"--config-dir={tmp_path}"]):
        assert as_typed([*flag, "recipe=mine"], conf_dir()) == [*flag, "recipe=mine"]
    for flag in ([f"hydra.searchpath=[file://{tmp_path}]"], ["--config-path", str(tmp_path)]):
        assert as_typed([*flag, "recipe=own"], conf_dir()) == [*flag, "recipe=own"]
    with pytest.raises(ConfigError, match="choose one of mine, toy_pt1"):
        as_typed(["--config-dir", str(tmp_path), "recipe=yours"], conf_dir())


@pytest.fixture
def command(tmp_path: Path, monkeypatch, capsys):
    """Runs a command line in a folder with files of one's own: its exit code, what it composed,
    and what it said."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    # Hydra's own logging, where a file has not turned it off, closes all handlers that there are.
    # absl's then closes what was stderr when it was imported: pytest's.
    monkeypatch.setattr(logging, "_handlerList", [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "whole.yaml").write_text("defaults: [config, _self_]\ntrainer: {steps: 7}")
    (tmp_path / "part.yaml").write_text("trainer: {steps: 7}")
    swept = "hydra: {mode: MULTIRUN, sweeper: {params: {trainer.seed: '1,2'}}}"
    (tmp_path / "sweep.yaml").write_text(f"defaults: [config, _self_]\n{swept}")

    def run(*arguments: str):
        made: list[Any] = []
        monkeypatch.setattr(sys, "argv", ["moss-train", *arguments])
        code = run_command_line(made.append, "moss-train")
        return code, made, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    "arguments",
    [
        ("--config-dir", ".", "-cn", "whole", "trainer.seed=3"),
        ("trainer.seed=3", "--config-name=whole", "--config-dir=."),
        ("trainer.seed=2", "--config-dir", ".", "--config-name", "whole", "trainer.seed=3"),
    ],
)
def test_a_configuration_of_ones_own_is_taken_from_its_folder(command, arguments):
    code, (raw,), said = command(*arguments)
    assert (code, raw.trainer.steps, raw.trainer.seed, said) == (0, 7, 3, "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            "--config-dir . --config-name none",
            "--config-name none: --config-dir FOLDER --config-name NAME",
        ),
        ("--config-path /none", "--config-path /none: --config-dir FOLDER --config-name NAME"),
        ("--config-dir=/none", "--config-dir=/none: --config-dir FOLDER --config-name NAME"),
        ("--config-path {} -cn whole", "whole.yaml names config, which is not there: --config-dir"),
        ("--config-dir . -cn part", "the file must begin with `defaults: [config, _self_]`"),
        (
            "--config-dir . -cn sweep",
            "hydra.sweeper.params (trainer.seed): one command is one run: for several write a loop:"
            " for x in 1 2; do ... trainer.seed=$x",
        ),
        ("run.dir=${{oc.env:NO_SUCH}}", "${oc.env:NO_SUCH}: the environment has no variable"),
    ],
)
def test_where_it_must_be_is_said_in_one_line(command, tmp_path: Path, arguments, says):
    code, made, said = command(*arguments.format(tmp_path).split())
    assert (code, made) == (2, [])
    assert says in said
    assert len(said.splitlines()) == 1


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
        (
            ["trainer.seed=3,4", "run.dir=x", "-m"],
            ["-m: one command is one run: for several write a loop: for x in 3 4; do ... trainer"],
        ),
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


@pytest.mark.parametrize("name", ["/none", "file:///none", "pkg://no_such_package"])
def test_a_searched_folder_that_is_not_there_is_named(command, name: str):
    code, made, said = command("model=toy", f"hydra.searchpath=[{name}]")
    bare = name.rpartition("://")[2]
    assert (code, made) == (2, [])
    assert said == f"moss-train: error: hydra.searchpath={bare}: there is no such folder\n"


def test_a_folder_of_presets_is_searched_without_a_word(command, tmp_path: Path, caplog):
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage/mine.yaml").write_text("defaults: [pt1]\n")
    code, made, said = command("model=toy", "stage=mine", f"hydra.searchpath=[file://{tmp_path}]")
    assert (code, said, caplog.text) == (0, "", "")
    assert made
