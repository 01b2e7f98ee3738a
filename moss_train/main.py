"""From what Hydra composed to a running job: types, checks, the run folder, then the loop."""

from __future__ import annotations

import gc
import os
import sys
import time
from pathlib import Path

import yaml
from omegaconf import DictConfig

from data_pipeline.commands import WRONG_USAGE, report_error
from moss_train.config import Config, ConfigError, from_hydra, to_dict
from moss_train.log import configure

PROGRAM = "moss-train"  # in front of errors


def train(raw: DictConfig) -> None:
    """Runs a training job on this rank. A wrong configuration exits with 2 and a line for each."""
    configure()
    try:
        config = from_hydra(raw)
        resume_from = check(config)
    except ConfigError as error:
        _refuse(error)
    # megatron is imported only now: a wrong configuration is refused in two seconds, not ten.
    # Python's collector finds nothing among what is imported, and took a sixth of that time.
    gc.disable()
    from moss_train.train.loop import run

    gc.enable()
    try:
        run(config, resume_from)
    except ConfigError as error:
        _refuse(error)


def check(config: Config) -> Path | None:
    """Validates `config`, writes config.yaml, and finds what to resume from.

    Raises:
        ConfigError: anything is wrong. No process group has been started.
    """
    from moss_train.validate import validate, world_size_from_environment

    validate(config, world_size_from_environment())
    resume_from = find_resume(config)
    if os.environ.get("RANK", "0") == "0":
        folder = Path(config.run.dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    return resume_from


def find_resume(config: Config) -> Path | None:
    """The checkpoint that this run continues, None for a new one; checks `init_from` too.

    Raises:
        ConfigError: a named checkpoint is missing or damaged, or has another architecture.
    """
    from moss_train.checkpoint_dir import find, read_run, read_streams
    from moss_train.validate import fitting_adapter, same_architecture, same_streams

    resume, init_from = config.trainer.resume, config.init_from
    own = chosen = find(Path(config.run.dir))
    if resume != "auto":
        chosen = None if resume == "none" else _must_find("trainer.resume", resume)
    if own is not None and (chosen is None or read_run(own)["step"] > read_run(chosen)["step"]):
        # Later steps of another course of training would be taken for this one's.
        raise ConfigError(
            [f"trainer.resume={resume}: {own} is ahead of that: choose another run.dir"]
        )
    if chosen is not None:
        if read_run(chosen).get("weights_only"):
            raise ConfigError(
                [f"trainer.resume={chosen}: holds weights alone: start from it with init_from"]
            )
        same_architecture(config, read_run(chosen)["config"], chosen)
        fitting_adapter(config, read_run(chosen)["config"], chosen, resume=True)
        same_streams(config, len(read_streams(chosen)), chosen)
    elif init_from is not None:
        source = _must_find("init_from", init_from)
        same_architecture(config, read_run(source)["config"], source)
        fitting_adapter(config, read_run(source)["config"], source, resume=False)
    return chosen


def _must_find(field: str, value: str) -> Path:
    from moss_train.checkpoint_dir import find

    path = find(Path(value))
    if path is None:
        raise ConfigError([f"{field}={value}: no complete checkpoint there: give a run folder"])
    return path


def _refuse(error: ConfigError) -> None:
    if os.environ.get("RANK", "0") == "0":
        for problem in error.problems:
            report_error(PROGRAM, problem)
    else:  # torchrun ends all ranks when the first one exits: let that be the one that has spoken
        time.sleep(10)
    sys.exit(WRONG_USAGE)
