"""Writes outcomes as indexed shards, `records.jsonl` in Streamo's form, and `rejected.jsonl`.

Shards depend on the outcomes alone: the same outcomes make the same bytes, however often the runs
that made them were stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from data_pipeline import files
from data_pipeline.atomic import new_folder, partial_path, publish, write_atomically
from data_pipeline.importers.draft import Draft, Entry, Medium
from data_pipeline.importers.media import MediaOptions, finish, shrink_video
from data_pipeline.importers.timeline import TimedText, Timeline
from data_pipeline.index import prepare_index
from data_pipeline.schema import SampleError
from data_pipeline.shards import write_shards
from data_pipeline.synthesis.config import SynthesisConfig
from data_pipeline.synthesis.cut import Source, key_of
from data_pipeline.synthesis.outcomes import Outcome
from data_pipeline.video import probe_video

SHARDS, RECORDS, REJECTED, MANIFEST = "shards", "records.jsonl", "rejected.jsonl", "synthesis.json"
OutcomeOf = Callable[[Source], Outcome | None]  # None: the video is not finished
AddLine = Callable[[dict[str, Any]], None]
_VERSION = 2  # of how outcomes become samples


@dataclass
class WriteCounts:
    """Counts of the samples that are in the shards, and of those that are not."""

    accepted: Counter[str] = field(default_factory=Counter)  # by role
    # By role and reason; a whole video or clip that cannot be used has the role "".
    rejected: Counter[tuple[str, str]] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)  # what transcripts lost, or had changed

    def data(self) -> dict[str, Any]:
        by_reason = [[role, reason, count] for (role, reason), count in self.rejected.items()]
        return {"accepted": dict(self.accepted), "rejected": sorted(by_reason),
                "notes": dict(self.notes)}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """An accepted candidate of a clip, or a rejected one (`fault`: reason and detail)."""

    source: Source
    clip: dict[str, Any]
    candidate: dict[str, Any]
    key: str
    fault: tuple[str, str] | None

    def record(self) -> dict[str, Any]:
        """The sample in Streamo's raw form, whose times count from 1: second n is `n + 1`."""
        start = self.clip["start"] + 1
        times = {name: [(one["text"], start + one["second"]) for one in self.candidate[name]]
                 for name in ("questions", "answers")}  # fmt: skip
        return {
            "video_name": self.source.name,
            "video_path": self.source.path,
            "task_type": self.candidate["role"],
            "source": "synthesis",
            "question": [{"content": text, "time": str(at)} for text, at in times["questions"]],
            "response": [{"content": text, "st_time": "", "end_time": "", "time": str(at)}
                         for text, at in times["answers"]],
        }  # fmt: skip


def samples(sources: Iterable[Source], outcome_of: OutcomeOf) -> Iterator[Sample]:
    """All candidates of finished videos, in the order of the sources.

    A video or clip that cannot be used is a rejected sample with the role ""; so is a video with
    the same bytes as an earlier one.
    """
    seen: dict[str, str] = {}
    nothing = {"role": "", "questions": [], "answers": []}
    for source in sources:
        outcome = outcome_of(source)
        if outcome is None:
            continue
        whole = {"start": 0, "end": 0, "timeline": None}
        key = key_of(source.name)
        if outcome["fault"]:
            yield Sample(source, whole, nothing, key, tuple(outcome["fault"]))
            continue
        first = seen.setdefault(outcome["sha256"], source.name)
        if first != source.name:
            yield Sample(source, whole, nothing, key, ("duplicate_video", f"the bytes of {first}"))
            continue
        for clip in outcome["clips"]:
            place = f"{key}-{clip['start']:05d}"
            if clip["fault"]:
                yield Sample(source, clip, nothing, place, tuple(clip["fault"]))
            for number, candidate in enumerate(clip["candidates"]):
                wrong = tuple(candidate["fault"]) if candidate["fault"] else None
                named = f"{place}-{candidate['role']}-{number}"
                yield Sample(source, clip, candidate, named, wrong)


def write(
    out: Path, sources: Sequence[Source], outcome_of: OutcomeOf, config: SynthesisConfig
) -> WriteCounts:
    """Writes shards and records, unless those in the folder were written from the same outcomes.

    Without an accepted sample no shards are written.
    """
    digest, manifest = _digest(sources, outcome_of, config), out / MANIFEST
    if manifest.exists():
        kept = json.loads(manifest.read_text())
        if kept["digest"] == digest:
            rejected = {(role, reason): count for role, reason, count in kept["rejected"]}
            return WriteCounts(Counter(kept["accepted"]), Counter(rejected), Counter(kept["notes"]))
    manifest.unlink(missing_ok=True)
    shutil.rmtree(out / SHARDS, ignore_errors=True)
    written = WriteCounts()
    for source in sources:
        # Outcomes of earlier versions have no notes.
        written.notes.update((outcome_of(source) or {}).get("notes", ()))
    with _lines(out / RECORDS) as record, _lines(out / REJECTED) as reject:
        made = _accepted(samples(sources, outcome_of), _Maker(config), written, record, reject)
        first = next(made, None)
        if first is not None:
            with new_folder(out / SHARDS) as folder:
                write_shards(chain([first], made), folder, config.output.samples_per_shard,
                             int(config.output.shard_size * 1e6))  # fmt: skip
                prepare_index(folder)
    write_atomically(manifest, json.dumps({"digest": digest, **written.data()}, indent=1) + "\n")
    return written


def _digest(sources: Sequence[Source], outcome_of: OutcomeOf, config: SynthesisConfig) -> str:
    """A digest of everything that decides what is written."""
    settings = [_VERSION, config.write.pace, asdict(config.output)]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for source in sources:
        digest.update(json.dumps([source.name, outcome_of(source)]).encode())
    return digest.hexdigest()


def _accepted(
    found: Iterable[Sample], maker: _Maker, written: WriteCounts, record: AddLine, reject: AddLine
) -> Iterator[dict[str, Any]]:
    """Yields the accepted samples as ShardWriter takes them; counts all of them, and adds each to
    the file of records or of rejected samples."""
    for sample in found:
        made = sample.fault or maker.members(sample)
        role = sample.candidate["role"]
        if isinstance(made, dict):
            written.accepted[role] += 1
            record(sample.record())
            yield made
            continue
        written.rejected[role, made[0]] += 1
        place = {"video": sample.source.path, "start": sample.clip["start"]}
        reject({"key": sample.key, "reason": made[0], "detail": made[1], **place,
                **_without_fault(sample.candidate)})  # fmt: skip


@contextmanager
def _lines(path: Path) -> Iterator[AddLine]:
    """Opens a file of JSON lines, which gets its name once it is complete; yields a function that
    adds a line."""
    # A file's name may have bytes that are not UTF-8: JSON has these escapes, too.
    with partial_path(path).open("w", encoding="utf-8", errors="backslashreplace") as file:
        yield lambda line: print(json.dumps(line, ensure_ascii=False), file=file)
    publish(partial_path(path))


def _without_fault(candidate: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in candidate.items() if name != "fault"}


class _Maker:
    """Makes samples; keeps the video of the latest clip, which several samples share."""

    def __init__(self, config: SynthesisConfig) -> None:
        self._pace, self._output = config.write.pace, config.output
        self._clip: tuple[str, int, int] | None = None
        self._medium = Medium("video", b"")

    def members(self, sample: Sample) -> dict[str, Any] | tuple[str, str]:
        """A sample as ShardWriter takes it, or the reason and detail why there is none."""
        try:
            medium = self._cut_out(sample)
        except SampleError as error:
            return error.reason, error.detail
        questions, answers = (
            tuple(TimedText(float(one["second"]), one["text"]) for one in sample.candidate[name])
            for name in ("questions", "answers")
        )
        end = float(sample.clip["end"] - sample.clip["start"])
        timeline = Timeline(questions, answers, end=end, pace=self._pace)
        draft = Draft([], [medium], "realtime", timeline=timeline)
        # No MediaOptions: _cut_out has shrunk the video already.
        made = finish(Entry(sample.key, sample.source.name, 0.0, draft), MediaOptions()).sample
        if isinstance(made, SampleError):
            return made.reason, made.detail
        data = json.loads(made["json"])
        data["task"] = sample.candidate["role"]
        # Evaluation expects pairs [second, sentence].
        data["speech"] = [[int(answer.second), answer.text] for answer in answers]
        return made | {"json": json.dumps(data, ensure_ascii=False).encode()}

    def _cut_out(self, sample: Sample) -> Medium:
        """The clip's video: the file as it is, or encoded anew where the clip is a part of it or
        output.max_side or output.video_fps ask for it."""
        path, start, end = sample.source.path, sample.clip["start"], sample.clip["end"]
        if self._clip != (path, start, end):
            data, suffix = files.read_bytes(path), files.suffix(path)
            whole = start == 0 and end + 1 >= probe_video(data).duration - 1e-3
            part = None if whole else (float(start), float(end + 1))
            if part or self._output.max_side or self._output.video_fps:
                data = shrink_video(data, self._output.max_side, self._output.video_fps, part)
                suffix = ".mp4"
            self._clip, self._medium = (path, start, end), Medium("video", data, suffix)
        return self._medium
