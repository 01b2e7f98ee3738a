"""Runs the jobs of an evaluation, several at a time, and keeps a record of each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.schema import SampleError
from inference.evaluate.results import ItemFile
from inference.evaluate.streaming.config import StreamingConfig
from inference.evaluate.streaming.items import Benchmark, Emission, Item, Reply, Watched
from inference.evaluate.streaming.protocols import poll, watch
from inference.evaluate.streaming.speaker import Speaker, SpeakerFailed

OFFICIAL, PUSH = "official", "push"
_IN_A_ROW = 8  # failures in a row after which the run stops
NO_MEDIA, UNREADABLE = "no media", "unreadable media"


@dataclass(frozen=True)
class Job:
    """An item, and the protocol in which it is given to the speaker."""

    benchmark: Benchmark
    item: Item
    protocol: str  # OFFICIAL or PUSH
    bias: float | None = None  # of `<|silence|>`; None: the configured one

    @property
    def file(self) -> str:
        """The name of the file with its record."""
        bias = "" if self.bias is None else f" bias {self.bias:g}"
        return f"{self.benchmark.name} {self.protocol}{bias}.jsonl"


# A speaker with this bias of `<|silence|>` (None: the configured one).
Speakers = Callable[[float | None], Speaker]


class JobRecords:
    """The records of finished jobs, in one file for each benchmark and protocol."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, ItemFile] = {}

    def file(self, job: Job) -> ItemFile:
        if job.file not in self._files:
            self._files[job.file] = ItemFile(self._folder / job.file)
        return self._files[job.file]

    def record(self, job: Job) -> dict[str, Any] | None:
        """A job's record, or None: `said` and `seconds` of push mode, `replies` of the official
        protocol, `skipped` or `failed`."""
        return self.file(job).items.get(job.item.id)


def replies_of(record: dict[str, Any]) -> list[Reply]:
    """The replies in a record of the official protocol."""
    return [Reply(**reply) for reply in record["replies"]]


def watched_of(record: dict[str, Any]) -> Watched:
    """The stream in a record of push mode."""
    return Watched(tuple(Emission.of(e) for e in record["said"]), record["seconds"])


class JobRunner:
    """Runs the jobs that have no record yet. `stopped` says why it ended before all were run.

    Args:
        step: called after each job.
    """

    def __init__(
        self,
        records: JobRecords,
        speakers: Speakers,
        config: StreamingConfig,
        step: Callable[[], None],
    ) -> None:
        self.stopped = ""
        self._records, self._speakers, self._config, self._step = records, speakers, config, step
        self._failures = 0  # in a row
        self._lock = threading.Lock()

    def run(self, jobs: Sequence[Job]) -> None:
        """Runs the jobs that have no record, `sessions` of them at a time."""
        waiting = [job for job in jobs if job.item.id not in self._records.file(job)]
        with ThreadPoolExecutor(self._config.sessions, "moss-evaluate") as pool:
            try:
                for done in [pool.submit(self._run_one, job) for job in waiting]:
                    done.result()
            except BaseException:  # Ctrl-C, too: jobs that wait are not begun
                self.stopped = self.stopped or "interrupted"
                raise

    def _run_one(self, job: Job) -> None:
        if self.stopped:
            return
        record = _run(job, self._speakers(job.bias), self._config)
        fatal = record.pop("fatal", False)
        with self._lock:
            self._failures = self._failures + 1 if "failed" in record else 0
            if fatal or self._failures >= _IN_A_ROW:
                self.stopped = self.stopped or record["failed"]
            if not fatal:  # else the next run asks again
                self._records.file(job).add(record)
        self._step()


def _run(job: Job, speaker: Speaker, config: StreamingConfig) -> dict[str, Any]:
    """Runs a job; its record, with `fatal` where the speaker cannot go on."""
    item, fps = job.item, config.speaking.fps
    record: dict[str, Any] = {"id": item.id, "row": item.row}
    if not item.video.is_file():
        return {**record, "skipped": NO_MEDIA, "media": [str(item.video)]}
    try:
        if job.protocol == OFFICIAL:
            replies = poll(speaker, job.benchmark, item, fps, config.max_frames)
            return {**record, "replies": [asdict(reply) for reply in replies]}
        watched = watch(speaker, item, fps)
        emissions = [emission.as_dict() for emission in watched.emissions]
        return {**record, "said": emissions, "seconds": watched.seconds}
    except SampleError as error:
        detail = f"{error.reason}: {error.detail}"
        return {**record, "skipped": UNREADABLE, "detail": detail, "media": [str(item.video)]}
    except SpeakerFailed as error:
        return {**record, "failed": str(error), "fatal": error.fatal}
