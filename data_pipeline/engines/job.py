"""What an import in parts is, which of its parts are there, and how one is made.

    OUT/build.json                     the arguments, and the result once it is there
    OUT/parts/00003/                   a finished part: an import of its own, with its build.json
    OUT/parts/.00003.HOST-PID-RANDOM/  one that is being made, or that a killed process left

A part gets its name by a rename, when all of it is there: a process that is killed leaves nothing
that counts, and of two that make the same part the first one's is taken. Nothing is locked.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from data_pipeline import files
from data_pipeline.atomic import write_atomically
from data_pipeline.build import (
    BuildOptions,
    arguments_of,
    check_rejected,
    import_entries,
    print_unread,
)
from data_pipeline.importers.draft import Entry
from data_pipeline.importers.forms import OpenSource, open_source
from data_pipeline.importers.journal import Journal, Summary, differences
from data_pipeline.importers.pool import Pool
from data_pipeline.importers.share import Share
from data_pipeline.progress import Progress
from data_pipeline.shards import ShardError

MANIFEST, PARTS = "build.json", "parts"
_LOOK = 5.0  # seconds between two looks whether another process has finished the part


class _MadeElsewhere(Exception):
    """Another process has finished this part."""


@dataclass(frozen=True)
class Job:
    """An import in `parts` parts, as all of its processes are told; out: a folder that all see."""

    source: str
    out: str
    options: BuildOptions
    parts: int

    @property
    def folder(self) -> Path:
        return Path(self.out) / PARTS

    def part(self, number: int) -> Path:
        return self.folder / f"{number:05d}"

    def missing(self) -> list[int]:
        """The parts that are not finished; none once they have been put together."""
        if not self.folder.exists():
            return []
        there = {path.name for path in self.folder.glob("[0-9]*")}
        return [number for number in range(self.parts) if f"{number:05d}" not in there]

    def begin(self, resume: bool, run: str = "") -> bool:
        """Opens the source and writes down what is to be made of it; whether all is done already.

        resume: goes on with what an earlier run left there. run: the name of this run, whose
        processes all call this. Raises ShardError.
        """
        out = Path(self.out)
        if files.is_url(self.out):
            raise ShardError(f"{out}: shards are written to a folder that all machines see")
        out.mkdir(parents=True, exist_ok=True)
        opened, arguments = self._opened()
        begun = {"arguments": arguments, "run": run, "result": None}
        if not (out / MANIFEST).exists() and any(out.glob("*/*.tar")):
            raise ShardError(f"{out} already holds shards: choose another folder")
        if not _write_first(out / MANIFEST, json.dumps(begun, indent=2)):
            manifest = json.loads((out / MANIFEST).read_text())
            if manifest["arguments"] != arguments:
                raise ShardError(
                    f"{out} holds an import with other arguments: "
                    f"{differences(manifest['arguments'], arguments)}: give the same ones, or "
                    "choose another folder"
                )
            if not resume and not (run and manifest.get("run") == run):
                raise ShardError(f"{out} holds this import already: --resume goes on with it")
            begun = manifest
        finished = begun["result"] is not None
        if not finished:
            print_unread(opened)
            self.folder.mkdir(exist_ok=True)
        return finished

    def _opened(self) -> tuple[OpenSource, dict[str, Any]]:
        """The source, and the arguments as JSON gives them back, so that they compare equal."""
        files.use_stores(self.options.stores)
        opened = open_source(self.source, self.options.source, Path(self.out))
        arguments = arguments_of(self.source, opened, self.options) | {"parts": self.parts}
        return opened, dict(json.loads(json.dumps(arguments)))


def _write_first(path: Path, text: str) -> bool:
    """Writes a file where there is none, whole at once; False: another process was faster."""
    if path.exists():
        return False
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w") as file:
            file.write(text + "\n")
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        os.unlink(draft)
    return True


def make_part(job: Job, number: int) -> None:
    """Makes a part, unless it is there. Raises ShardError.

    Whatever ends the process costs what it has done of this part.
    """
    if job.part(number).exists():
        return
    torch.set_num_threads(1)
    if not (Path(job.out) / MANIFEST).exists():
        raise ShardError(f"{socket.gethostname()} does not see {job.out}: all machines must share "
                         "that folder")  # fmt: skip
    recorded = json.loads((Path(job.out) / MANIFEST).read_text())["arguments"]
    opened, arguments = job._opened()
    if arguments != recorded:
        raise ShardError(
            f"{socket.gethostname()} sees another source: {differences(recorded, arguments)}: it "
            "was changed, or another folder has its name there"
        )
    name = f".{number:05d}.{socket.gethostname()}-{os.getpid()}-"
    try:
        attempt = Path(tempfile.mkdtemp(prefix=name, dir=job.folder))
    except FileNotFoundError:  # all parts have been put together
        return
    try:
        _import(job, number, attempt, opened, arguments)
        attempt.rename(job.part(number))
    except _MadeElsewhere:
        pass
    except OSError:
        if job.folder.exists() and not job.part(number).exists():
            raise
    finally:
        shutil.rmtree(attempt, ignore_errors=True)


def _import(
    job: Job, number: int, attempt: Path, opened: OpenSource, arguments: dict[str, Any]
) -> None:
    options = replace(job.options, max_rejected=None)  # of all parts together
    journal = Journal(attempt, arguments | {"part": number})
    try:
        entries = _until_made(opened.entries(Share(number, job.parts)), job.part(number))
        progress = Progress("", visible=False)
        import_entries(entries, journal, Pool(0), options, progress, f"part-{number:05d}")
        journal.finish(opened.left_out)
    finally:
        journal.close()


def _until_made(entries: Iterator[Entry], part: Path) -> Iterator[Entry]:
    next_look = time.monotonic() + _LOOK
    for entry in entries:
        if time.monotonic() > next_look:
            next_look = time.monotonic() + _LOOK
            if part.exists():
                raise _MadeElsewhere
        yield entry


def summary_of(job: Job) -> Summary:
    """The counts of all parts that are finished."""
    summary = Summary()
    for number in range(job.parts):
        with suppress(FileNotFoundError):
            result = json.loads((job.part(number) / MANIFEST).read_text())["result"]
            summary.add(result)
    return summary


def check_parts(job: Job, last: bool = False) -> Summary:
    """The counts of the finished parts; TooManyRejectedError where --max-rejected says so."""
    summary = summary_of(job)
    check_rejected(summary, job.options.max_rejected, summary.records, last)
    return summary


def write_result(job: Job, summary: Summary) -> None:
    manifest = json.loads((Path(job.out) / MANIFEST).read_text())
    text = json.dumps(manifest | {"result": summary.result()}, indent=2)
    write_atomically(Path(job.out) / MANIFEST, text + "\n")


def read_result(job: Job) -> Summary | None:
    """The counts of a finished import; None: it is not finished."""
    result = json.loads((Path(job.out) / MANIFEST).read_text())["result"]
    if result is None:
        return None
    summary = Summary()
    summary.add(result)
    return summary
