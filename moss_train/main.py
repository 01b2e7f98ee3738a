"""From what Hydra composed to a running job: types, checks, the run folder, then the loop."""

from __future__ import annotations

import gc
import os
import sys
import time
from pathlib import Path
from typing import TextIO

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
        run(from_hydra(raw))
    except ConfigError as error:
        _refuse(error)


def run(config: Config, console: TextIO | None = None) -> bool:
    """Checks `config` and runs its job on this rank; True where a signal stopped it.

    Args:
        console: for the lines of the steps and the table at the end (default: stdout).

    Raises:
        ConfigError: the configuration is wrong; nothing has been started.
    """
    resume_from = check(config)
    # megatron is imported only now: a wrong configuration is refused in two seconds, not ten.
    # Python's collector finds nothing among what is imported, and took a sixth of that time.
    gc.disable()
    from moss_train.train import loop

    gc.enable()
    return loop.run(config, resume_from, console)


def check(config: Config) -> Path | None:
    """Validates `config`, writes config.yaml, and finds what to resume from.

    Raises:
        ConfigError: anything is wrong. No process group has been started.
    """
    from moss_train.resume import find_resume
    from moss_train.validate import validate

    world_size = int(os.environ.get("WORLD_SIZE", "1"))  # 1 without torchrun
    validate(config, world_size)
    folder = Path(config.run.dir)
    for path in (folder, *folder.absolute().parents):
        if path.exists() and not path.is_dir():
            raise ConfigError([f"run.dir={folder}: {path} is not a folder: give another one"])
    resume_from = find_resume(config, world_size)
    if os.environ.get("RANK", "0") == "0":
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    return resume_from


def _refuse(error: ConfigError) -> None:
    if os.environ.get("RANK", "0") == "0":
        for problem in error.problems:
            report_error(PROGRAM, problem)
    else:  # torchrun ends all ranks when the first one exits: let that be the one that has spoken
        time.sleep(10)
    sys.exit(WRONG_USAGE)
