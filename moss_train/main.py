"""From what Hydra composed to a running job: types, checks, the run folder, then the loop."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TextIO

from omegaconf import DictConfig

from data_pipeline.commands import STOPPED, WRONG_USAGE, describe, report_error
from data_pipeline.ranks import JoinError, RanksError, ranks_of
from moss_train.checkpoint_dir import checkpoints_folder
from moss_train.config import Config, ConfigError, from_hydra
from moss_train.imports import quick_imports
from moss_train.log import configure, print_line
from moss_train.overrides import configured_paths
from moss_train.processes import PROGRAM, STOPPED_NOTE
from moss_train.run_lock import check_free
from moss_train.storage import StorageError, or_warning


def train(raw: DictConfig) -> None:
    """Runs a training job on this rank.

    Raises:
        SystemExit: with 2 and a line for each field that is wrong, with 1 where the job cannot
            start, with 130 where a signal stopped it. torchrun takes that for a failure, and would
            start the ranks again: under it they end with 0 and leave a note for
            launch/torchrun.py, which ends with 130.
    """
    configure()
    note = os.environ.get(STOPPED_NOTE)
    try:
        stopped = run(from_hydra(raw))
        if note is not None:
            # A start of the ranks before may have left one: torchrun stops them to begin with more
            # machines.
            with or_warning(note, "the launcher may take a stopped job for done"):
                Path(note).write_text("stopped" if stopped else "")
        if stopped and "TORCHELASTIC_RUN_ID" not in os.environ:
            sys.exit(STOPPED)
    except ConfigError as error:
        _refuse(error)
    except RanksError as error:  # every rank speaks: it may be the only one that has started
        sys.exit(report_error(PROGRAM, error, WRONG_USAGE))
    except (JoinError, StorageError) as error:
        sys.exit(report_error(PROGRAM, error))


def run(config: Config, console: TextIO | None = None) -> bool:
    """Checks `config` and runs its job on this rank; True where a signal stopped it.

    Args:
        console: for the lines of the steps and the table at the end (default: stdout).

    Raises:
        ConfigError: the configuration is wrong; nothing has been started.
        RanksError, JoinError: this is a rank of a job that cannot start.
        StorageError: the storage does not answer, or does not take the last checkpoint.
    """
    resume_from = check(config)
    # megatron is imported only now: a wrong configuration is refused in two seconds, not six.
    with quick_imports():
        from moss_train.train import loop, memory_check, shared_memory

    memory_check.check_fits(config)
    shared_memory.check_shared_memory(config)
    if not config.trainer.eval_suites:
        return loop.run(config, resume_from, console)
    with quick_imports():
        from moss_train.evaluate.in_training import Suites

    return loop.run(config, resume_from, console, Suites)


def check(config: Config) -> Path | None:
    """Validates `config` and finds what to resume from; nothing is written.

    Raises:
        ConfigError: anything is wrong. No process group has been started.
        RanksError: the environment says a job that cannot start.
    """
    from moss_train.resume import find_resume
    from moss_train.validate import validate

    world_size = ranks_of().size
    try:
        validate(config, world_size)
        for folder in (Path(config.run.dir), checkpoints_folder(Path(config.run.dir))):
            _check_folder(Path(config.run.dir), folder)
        if os.environ.get("RANK", "0") == "0":
            check_free(Path(config.run.dir))
        return find_resume(config)
    except OSError as error:  # no permission, a name that is too long
        raise ConfigError([_with_field(error, config)]) from None


def _with_field(error: OSError, config: Config) -> str:
    """What the system said of a file, behind the field that leads there, if one does."""
    paths = {key: path for key, path in configured_paths(config).items() if path}
    for suite in config.trainer.eval_suites:
        paths[f"trainer.eval_suites[{suite.name}].path"] = suite.path
    file = Path(os.fsdecode(error.filename or ""))
    found = [(len(path), key) for key, path in paths.items() if file.is_relative_to(path)]
    if not found:
        return describe(error)
    _, key = max(found)
    return f"{key}={paths[key]}: {describe(error)}"


def _check_folder(run: Path, folder: Path) -> None:
    """Raises ConfigError where the run folder, or a `folder` of its, cannot be made or written."""
    for path in (folder, *folder.absolute().parents):
        if not path.exists():
            if path.is_symlink():  # to a scratch, say, that is not mounted
                there = f"{path} leads to {os.readlink(path)}, which is not there"
                raise ConfigError([f"run.dir={run}: {there}: make it, or give another one"])
            continue
        if not path.is_dir():
            raise ConfigError([f"run.dir={run}: {path} is not a folder: give another one"])
        if not os.access(path, os.W_OK | os.X_OK):
            raise ConfigError([f"run.dir={run}: {path} cannot be written: give another one"])
        return


def _refuse(error: ConfigError) -> None:
    if os.environ.get("RANK", "0") != "0":
        # torchrun ends all ranks when the first one exits: let that be the one that has spoken. A
        # rank that lives on is the only one that refuses, since its machine is another.
        time.sleep(10)
        print_line("this rank refuses what others may have taken:")
    for problem in error.problems:
        report_error(PROGRAM, problem)
    sys.exit(WRONG_USAGE)
