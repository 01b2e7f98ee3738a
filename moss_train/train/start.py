"""Where a job begins: at which checkpoint, whose files are as they were written, and what is left.

The size of every file has been compared before (checkpoint_dir.py). Here the ranks read all of them
together, each its share, and compare checksums: a file system may give back other bytes than it
took, and torch's reader would load them.
"""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moss_train.checkpoint_dir import find, listed_files, read_run
from moss_train.config import Config, ConfigError
from moss_train.log import log
from moss_train.resume import changed_fields, find_resume
from moss_train.sources import order_changes
from moss_train.storage import NOT_THERE, StorageError, describe_files, patiently


def agree_on_start(config: Config, resume_from: Path | None) -> tuple[Path | None, list[Path]]:
    """The checkpoint that the job goes on from, None for a new run, and those of the run that are
    damaged and newer. A collective: all ranks take rank 0's folder and answer.

    Raises:
        ConfigError: a checkpoint that the configuration names is damaged, or none of the run is
            whole.
        StorageError: the storage does not answer.
    """
    damaged: dict[Path, str] = {}
    # Ranks that started in different seconds may name different folders.
    config.run.dir, resume_from = _from_first((config.run.dir, resume_from))
    if resume_from is None and config.init_from is not None:
        source = _from_first(find(Path(config.init_from)))
        wrong = damage(source)
        if wrong is not None:
            raise ConfigError([f"init_from={config.init_from}: {source} is damaged: {wrong}"])
    while resume_from is not None:
        wrong = damage(resume_from)
        if wrong is None:
            break
        if config.trainer.resume != "auto":
            raise ConfigError(
                [f"trainer.resume={config.trainer.resume}: {resume_from} is damaged: {wrong}"]
            )
        log.warning("checkpoint %s is damaged: %s: trying the one before", resume_from, wrong)
        damaged[resume_from] = wrong
        resume_from = _again(config, damaged)
    return resume_from, list(damaged)


def last_whole(run: Path) -> Path | None:
    """The newest checkpoint of a run whose files have the bytes that were written; None: there is
    none. A collective."""
    damaged: list[Path] = []
    while True:
        source = _from_first(find(run, damaged) if dist.get_rank() == 0 else None)
        wrong = None if source is None else damage(source)
        if wrong is None:
            return source
        log.warning("checkpoint %s is damaged: %s: trying the one before", source, wrong)
        damaged.append(source)


def _again(config: Config, damaged: dict[Path, str]) -> Path | None:
    """`find_resume` without the `damaged` ones, on rank 0; its answer or error on all ranks."""
    answer: Path | ConfigError | StorageError | None = None
    if dist.get_rank() == 0:
        try:
            answer = find_resume(config, damaged)
        except ConfigError as error:
            answer = ConfigError(error.problems)
        except StorageError as error:
            answer = StorageError(str(error))
    found = _from_first(answer.problems if isinstance(answer, ConfigError) else answer)
    if isinstance(found, list):
        raise ConfigError(found)
    if isinstance(found, StorageError):
        raise found
    return found


def damage(checkpoint: Path) -> str | None:
    """Which file of a checkpoint has not the bytes that were written; None: all have, or nobody
    wrote down what they were. A collective: each rank reads its share.

    Raises:
        StorageError: a rank cannot read its share, or does not see what rank 0 sees.
    """
    began = time.perf_counter()
    recorded, found, failed = dict[str, dict[str, Any]](), "", ""
    try:
        files = patiently(lambda: listed_files(checkpoint), checkpoint)
        recorded = {name: about for name, about in files.items() if "crc32" in about}
        # The largest ones first, one after the other: even shares.
        ordered = sorted(recorded, key=lambda name: (-recorded[name]["size"], name))
        share = ordered[dist.get_rank() :: dist.get_world_size()]
        paths = [checkpoint / name for name in share]
        read = patiently(lambda: describe_files(checkpoint, paths), checkpoint)
        wrong = [name for name in share if read[name] != recorded[name]]
        if wrong:
            found = f"{', '.join(wrong)}: not the bytes that were written"
    except NOT_THERE as error:
        found = f"{error.filename} is not there"
        # Rank 0 has seen all files. A machine that does not see one says nothing of the checkpoint:
        # its storage is not mounted, or behind.
        if dist.get_rank():
            failed = (
                f"{found} for rank {dist.get_rank()}, on {socket.gethostname()}, but for rank 0: "
                "nothing was changed; start again when all machines see the same files"
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"complete.json cannot be read ({error})"
    except StorageError as error:
        failed = str(error)
    everywhere: list[tuple[str, str]] = [("", "")] * dist.get_world_size()
    dist.all_gather_object(everywhere, (found, failed))
    for _, failed in everywhere:
        if failed:
            raise StorageError(failed)
    size = sum(about["size"] for about in recorded.values()) / 1e9
    log.info(
        "%s: %.2f GB compared with their checksums, %.1f s",
        checkpoint, size, time.perf_counter() - began,
    )  # fmt: skip
    return next((found for found, _ in everywhere if found), None)


def steps_left(config: Config, resume_from: Path | None) -> tuple[int, list[str]]:
    """Steps that the run has not done yet, and what it does otherwise than before. Logs that, and
    that there is nothing to do; nothing is written then.
    """
    if resume_from is None:
        return config.steps, []
    saved = read_run(resume_from)
    done = int(saved["step"])
    changed = list(changed_fields(config, saved["config"]))
    for line in changed:
        log.info("changed since step %d: %s", done, line)
    exact = config.trainer.resume_data == "exact"  # then find_resume has found no change
    for line in () if exact else order_changes(config, saved):
        log.warning("data since step %d: %s: what has changed begins anew", done, line)
    left = max(0, config.steps - done)
    if not left:
        log.warning(
            "nothing to do: step %d of %d is done, %s: for more steps raise trainer.steps",
            done, config.steps, resume_from,
        )  # fmt: skip
    return left, changed


def _from_first(value: Any) -> Any:
    """`value` of rank 0, on every rank. A collective."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
