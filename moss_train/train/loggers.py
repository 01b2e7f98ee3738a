"""wandb and TensorBoard: copies of metrics.jsonl, in which every step of a run is once.

A run may be resumed before steps that were logged, or go back after bad steps. Then metrics.jsonl
loses these steps (metrics.py), and the copies follow it:

- TensorBoard is told from which step on its older values do not count.
- An offline run of wandb is written anew from metrics.jsonl, whenever a process starts or steps go
  back, so that its newest folder holds the whole run: `wandb sync` of a second folder would replace
  the first one's steps. The older folders are removed.
- An online run goes on after the last step that the server has. wandb takes no step twice: of
  repeated steps, the server keeps the first values.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from moss_train.checkpoint_dir import read_run
from moss_train.config import Config, ConfigError, to_dict
from moss_train.log import log
from moss_train.storage import or_warning
from moss_train.train.metrics import TENSORBOARD_DIR, logged_values, read_metrics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

WANDB_ID_FILE = "wandb_id"

Row = tuple[int, dict[str, float]]  # a step and its values


@contextmanager
def open_loggers(config: Config, resume_from: Path | None) -> Iterator[list[Wandb | TensorBoard]]:
    """The loggers of a run that goes on from `resume_from`, on rank 0; none on other ranks.

    They are opened before the process group and the model, which take minutes.

    Raises:
        ConfigError: wandb cannot start.
    """
    done = 0 if resume_from is None else read_run(resume_from)["step"]
    loggers: list[Wandb | TensorBoard] = []
    failed = True
    try:
        if os.environ.get("RANK", "0") == "0" and done < config.steps:
            folder, chosen = Path(config.run.dir), config.logger
            if chosen.wandb and chosen.mode == "disabled":
                log.info("wandb is disabled (logger.wandb_mode, or WANDB_MODE)")
            elif chosen.wandb:
                loggers.append(Wandb(folder, config, done))
            if chosen.tensorboard:
                loggers.append(TensorBoard(folder, done))
        yield loggers
        failed = False
    finally:
        close_loggers(loggers, failed)


def close_loggers(loggers: list[Wandb | TensorBoard], failed: bool) -> None:
    """Closes all that are in the list, which is empty then."""
    while loggers:
        logger = loggers.pop(0)
        with or_warning(f"{type(logger).__name__}'s files"):
            logger.close(failed)


class Wandb:
    """A run of Weights & Biases, whose steps are those of training.

    A job that fails before its first step leaves nothing of it.
    """

    def __init__(self, run_dir: Path, config: Config, done: int):
        """Opens the run, whose id is in `run_dir`/wandb_id, with its steps up to `done`."""
        self._dir, self._config = run_dir, config
        self._offline = config.logger.mode == "offline"
        self._id_file, self._wrote = run_dir / WANDB_ID_FILE, False
        resumed = self._id_file.exists()
        self._id = self._id_file.read_text().strip() if resumed else secrets.token_hex(4)
        self._open(done)

    def _open(self, done: int) -> None:
        import wandb

        self._wait_for_a_new_name()
        self._dir.mkdir(parents=True, exist_ok=True)
        logger = self._config.logger
        try:
            self._run = wandb.init(
                project=logger.project or os.environ.get("WANDB_PROJECT") or "moss-video",
                name=self._dir.resolve().name,
                id=self._id,
                resume=None if self._offline else "allow",  # offline there is nothing to resume
                mode="offline" if self._offline else "online",
                dir=str(self._dir),
                config=to_dict(self._config),
                settings=wandb.Settings(console="off", silent=self._offline),
            )
        except Exception as error:  # of many kinds, by version and cause
            self._remove_empty()
            cause = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(
                [
                    f"logger.wandb=true: wandb cannot start: {cause} (logger.wandb_mode=offline "
                    "needs neither network nor account, disabled does without wandb)"
                ]
            ) from None
        self._next = self._run.starting_step  # the first step that it takes
        for step, values in logged_steps(self._dir, done):
            self._log(step, values)

    def _log(self, step: int, values: dict[str, float]) -> None:
        if step >= self._next:
            self._run.log(values, step=step)
            self._next = step + 1

    def write(self, step: int, values: dict[str, float]) -> None:
        if not self._wrote:
            self._id_file.write_text(self._id + "\n")
            self._wrote = True
        self._log(step, values)

    def rewind(self, step: int) -> None:
        if self._offline:
            self._run.finish()
            self._open(step)
            self._keep(self._folder)
        else:
            log.warning("wandb keeps the first values of steps %d to %d", step + 1, self._next - 1)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
        if self._offline and self._wrote:
            self._keep(self._folder)
            log.info("to upload the run: wandb sync %s", shlex.quote(str(self._folder)))
        elif self._offline:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._remove_empty()

    @property
    def _folder(self) -> Path:
        return Path(self._run.dir).parent

    def _folders(self) -> Iterator[Path]:
        yield from (self._dir / "wandb").glob(f"offline-run-*-{self._id}")

    def _keep(self, kept: Path) -> None:
        """Removes the folders of before, whose steps are in `kept`, too."""
        for folder in self._folders():
            if folder.name != kept.name:
                shutil.rmtree(folder)

    def _remove_empty(self) -> None:
        """Removes the folder of wandb where only its links are left, then an empty run folder."""
        inside = list((self._dir / "wandb").glob("*"))
        if inside and all(path.is_symlink() for path in inside):
            shutil.rmtree(self._dir / "wandb")
        with suppress(OSError):
            self._dir.rmdir()

    def _wait_for_a_new_name(self) -> None:
        """wandb names a run's folder by the second."""
        newest = max((folder.stat().st_mtime for folder in self._folders()), default=0.0)
        time.sleep(max(0.0, min(1.1, newest + 1.1 - time.time())))


class TensorBoard:
    """Event files of TensorBoard."""

    def __init__(self, run_dir: Path, done: int):
        """Makes a file at the first step, in which steps after `done` replace earlier files'."""
        self._folder, self._done = str(run_dir / TENSORBOARD_DIR), done

    @cached_property
    def _writer(self) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self._folder, purge_step=self._done + 1, flush_secs=10)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        """Writes into the same file what a new one with `purge_step` begins with: files of one
        second have no order."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        again = SessionLog(status=SessionLog.START)
        file = self._writer._get_file_writer()
        file.add_event(Event(step=step + 1, session_log=again), step=step + 1)

    def close(self, failed: bool) -> None:
        if "_writer" in vars(self):
            self._writer.close()


def logged_steps(run_dir: Path, done: int) -> Iterable[Row]:
    """The steps up to `done` in metrics.jsonl, as loggers get them."""
    return [
        (row["step"], logged_values(row)) for row in read_metrics(run_dir) if row["step"] <= done
    ]
