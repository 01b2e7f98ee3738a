"""One save of a checkpoint: written under a temporary name, summed, renamed when it is complete.

A rank that fails alone would leave the others in a collective. So whatever may fail for want of
space or of storage is either agreed on by all ranks, or megatron's own, which does that.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import common
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint.api import CheckpointException

from data_pipeline.atomic import write_atomically
from moss_train.checkpoint_dir import set_aside, write_complete
from moss_train.log import log
from moss_train.storage import StorageError, describe_files, or_warning

RESERVE = 4 << 20  # bytes for each eight ranks: what rank 0 writes alone, most of it .metadata
# What writes them in megatron-core: .metadata, metadata.json and, before 0.19, common.pt.
_WRITTEN_ALONE = [
    (FileSystemWriterAsync, "finish", ".metadata"),
    (serialization, "save_config", "metadata.json"),
]
if hasattr(common, "TorchCommonSaveStrategy"):
    _WRITTEN_ALONE.append((common.TorchCommonSaveStrategy, "save_common", "common.pt"))


class SaveError(StorageError):
    """A checkpoint could not be written. All ranks raise it."""


class Save:
    """A checkpoint that is being written. `open`, then the writing, then `complete`."""

    def __init__(self, folder: Path, step: int):
        """`folder`: of the run's checkpoints."""
        self.folder, name = folder, f"step_{step:08d}"
        self.target, self.temporary = folder / name, folder / f".writing_{name}"
        self.reserve = self.temporary / ".reserve"
        self.sums = self.temporary / f".sums_{dist.get_rank()}.json"
        self._alone: list[str] = []  # why what rank 0 writes alone could not be written

    def open(self) -> None:
        """Makes the folder, and sees to it that what rank 0 writes alone will fit. A collective.

        Raises:
            SaveError: it does not.
        """

        def make() -> None:
            shutil.rmtree(self.temporary, ignore_errors=True)  # what is left of a save that failed
            # Not its parents: where the run's folder is gone, its storage is, and what is written
            # there would lie on another one.
            self.folder.mkdir(exist_ok=True)
            self.temporary.mkdir()
            with self.reserve.open("wb") as file:
                size = RESERVE * (1 + dist.get_world_size() // 8)
                os.posix_fallocate(file.fileno(), 0, 2 * size)
                os.truncate(self.reserve, size)  # half of it is for megatron's common.pt

        self._on_first_rank(make)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Within, a file that rank 0 of megatron writes alone and that cannot be written is noted,
        for `complete`, and raises nothing: the other ranks are in a collective by then, and would
        wait for rank 0."""

        def noting(write: Callable[..., None], file: str) -> Callable[..., None]:
            def call(*args: Any) -> None:
                try:
                    write(*args)
                except (OSError, RuntimeError) as error:  # torch.save's is the latter, without name
                    cause = _cause(error)
                    self._alone.append(cause if file in cause else f"{file}: {cause}")

            return call

        with ExitStack() as changed:
            for owner, name, file in _WRITTEN_ALONE:
                write = getattr(owner, name)
                setattr(owner, name, noting(write, file))
                changed.callback(setattr, owner, name, write)
            yield

    def summing(self, request: AsyncRequest) -> AsyncRequest:
        """A `request` of megatron's whose writer also computes this rank's checksums."""
        if request.async_fn is None:  # this rank has nothing to write
            return request
        write = partial(_write_and_sum, request.async_fn, self.temporary, self.sums)
        return request._replace(async_fn=write)

    def complete(
        self, finalize_fns: Sequence[Callable[[], None]], rest: Callable[[], dict[str, str]]
    ) -> None:
        """Finishes the checkpoint after the writing: adds the remaining files, then gives it its
        name. A collective.

        Args:
            finalize_fns: megatron's.
            rest: contents of our own files, by name.

        Raises:
            SaveError: something was not written; what was is removed.
        """
        problem: str | None = None
        if dist.get_rank() == 0:
            try:
                self.reserve.unlink(missing_ok=True)
            except OSError as error:
                self._alone.append(_cause(error))
        try:
            with self.noting():
                for finalize in finalize_fns:
                    finalize()
            problem = next(iter(self._alone), None)
        except CheckpointException as error:  # on all ranks; rank 0 knows the cause
            problem = _cause(error)
        sums: dict[str, Any] = {}
        try:
            if problem is None and self.sums.exists():
                sums = json.loads(self.sums.read_text())
                self.sums.unlink()
        except (OSError, ValueError) as error:
            problem = _cause(error)
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, (problem, sums))
        problems = [found for found, _ in everywhere if found is not None]
        described = {name: about for _, part in everywhere for name, about in part.items()}

        def publish() -> None:
            if problems:
                raise SaveError(problems[0])
            for name, content in rest().items():
                (self.temporary / name).write_text(content)
            write_complete(self.temporary, described)
            if self.target.exists():  # damaged, or the run would have gone on after it
                set_aside(self.target)
            self.temporary.rename(self.target)
            log.info("saved %s", self.target)
            latest = self.folder / "latest"  # for people: nothing here reads it
            with or_warning(latest, "the checkpoint is whole without it"):
                write_atomically(latest, self.target.name + "\n")

        self._on_first_rank(publish)

    def _on_first_rank(self, work: Callable[[], None]) -> None:
        """Raises SaveError on all ranks where `work` fails on rank 0."""
        problem: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                work()
            except (OSError, SaveError) as error:
                problem[0] = self._describe(error)
                shutil.rmtree(self.temporary, ignore_errors=True)
        dist.broadcast_object_list(problem, src=0)
        if problem[0] is not None:
            raise SaveError(problem[0])

    def _describe(self, error: Exception) -> str:
        free = ""
        with suppress(OSError):  # a storage that is gone
            free = f" ({shutil.disk_usage(self.folder).free / 1e9:.1f} GB are free there)"
        return f"{self.temporary} could not be written{free}: {_cause(error)}"


def _write_and_sum(
    write: Callable[..., None], folder: Path, sums: Path, *args: Any, **options: Any
) -> None:
    """Runs in the writer: `write`, then the checksums of what this rank wrote, read back while the
    system still has it in memory."""
    write(*args, **options)
    rank = sums.stem.rpartition("_")[2]
    try:
        written = describe_files(folder, folder.glob(f"*__{rank}_*.distcp"))
        sums.write_text(json.dumps(written))
    except OSError as error:
        log.error("%s: the files of rank %s could not be read back: %s", folder, rank, error)


def _cause(error: BaseException) -> str:  # CheckpointException is no Exception
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
