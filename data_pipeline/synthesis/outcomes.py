"""Makes the outcome of each video, many at a time; a finished video is not done again."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from data_pipeline import files
from data_pipeline.progress import Progress, rate
from data_pipeline.schema import SampleError
from data_pipeline.synthesis.budget import BudgetReached
from data_pipeline.synthesis.candidate import Candidate, candidate_of, duplicate_of, fault
from data_pipeline.synthesis.check import Check
from data_pipeline.synthesis.config import SynthesisConfig
from data_pipeline.synthesis.cut import Clip, Source, clips
from data_pipeline.synthesis.endpoint import RequestFailed
from data_pipeline.synthesis.model import Model
from data_pipeline.synthesis.prompts import Prompts
from data_pipeline.synthesis.store import Store
from data_pipeline.synthesis.watch import ConfirmedClip, watch

_VERSION = 1  # of what an outcome depends on besides the settings
# Requests that a video has under way at a time, about. Decides how many videos are worked on.
_REQUESTS_A_VIDEO = 4

# The result of a video: `sha256` and `clips` with their candidates, or a `fault`; `notes` on its
# transcript.
Outcome = dict[str, Any]


@dataclass
class Finished:
    """How far all runs into a folder have come."""

    videos: int = 0  # with an outcome, of this run or an earlier one
    # Videos with a request that failed, and why; the next run tries them again.
    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False  # whether the budget was reached


def fingerprint(source: Source, config: SynthesisConfig, prompts: Prompts) -> str:
    """A digest of everything that decides a video's outcome, except the models' replies."""
    endpoint = config.endpoint
    settings = [
        _VERSION, source.name, source.identity(), prompts.text,
        endpoint.model, endpoint.of_text()[1], endpoint.temperature,
        asdict(config.cut), asdict(config.write), asdict(config.check),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


async def make_outcomes(
    sources: Sequence[Source], store: Store, config: SynthesisConfig, prompts: Prompts
) -> Finished:
    """Makes the outcomes of all sources that have none yet, and stores each at once.

    Raises EndpointError where no request can succeed; finished videos stay finished.
    """
    done = Finished()
    progress = Progress("synthesize", len(sources), unit="videos")
    work = _Work(store, config, prompts, progress)
    waiting = []
    for source in sources:
        if store.finished(source.path, fingerprint(source, config, prompts)):
            done.videos += 1
            progress.step()
        else:
            waiting.append(source)
    queue = iter(waiting)

    async def worker() -> None:
        for source in queue:
            if done.stopped:
                return
            try:
                await work.video(source)
            except BudgetReached:
                done.stopped = True
            except RequestFailed as error:
                done.failed[source.path] = str(error)
            else:
                done.videos += 1
                progress.step(note=work.note())

    count = min(len(waiting), max(1, config.endpoint.concurrency // _REQUESTS_A_VIDEO))
    tasks = [asyncio.ensure_future(worker()) for _ in range(count)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await work.model.close()
        progress.end(work.note())
    return done


class _Work:
    """Makes the outcome of one video after the other, and counts the samples of all."""

    def __init__(
        self, store: Store, config: SynthesisConfig, prompts: Prompts, progress: Progress
    ) -> None:
        self.model = Model(config, prompts, store, lambda: progress.step(0, note=self.note()))
        self._store, self._config, self._prompts = store, config, prompts
        self._began = asyncio.get_running_loop().time()
        self._accepted = self._rejected = 0

    def note(self) -> str:
        """The running total: requests and their rate, tokens and cost of all runs, samples."""
        ledger, sent = self.model.ledger, self.model.sent.total()
        speed = rate(sent / max(asyncio.get_running_loop().time() - self._began, 1e-9))
        total = (ledger.tokens_in + ledger.tokens_out) / 1e6
        cost = f", cost {ledger.cost:.2f}" if ledger.cost else ""
        return (f"{sent} requests ({speed}/s), {total:.2f}M tokens in all{cost}, "
                f"{self._accepted} samples, {self._rejected} rejected")  # fmt: skip

    async def video(self, source: Source) -> None:
        """Makes a video's outcome, and stores it."""
        notes: list[str] = []
        try:
            data = await asyncio.to_thread(files.read_bytes, source.path)
            parts = await asyncio.to_thread(clips, source, data, self._config.cut, notes)
        except SampleError as error:
            wrong = [error.reason, error.detail]
            outcome: Outcome = {"fault": wrong, "clips": [], "notes": notes}
        else:
            made = await _all([self._clip(clip) for clip in parts])
            digest = hashlib.sha256(data).hexdigest()
            outcome = {"sha256": digest, "fault": None, "clips": made, "notes": notes}
        mark = fingerprint(source, self._config, self._prompts)
        self._store.finish(source.path, mark, outcome)

    async def _clip(self, clip: Clip) -> dict[str, Any]:
        """A clip's part of the outcome: timeline, and candidates with their faults."""
        watched = await watch(clip, self.model, self._config)
        if watched is None:
            detail = f"no {self._config.cut.shortest} s of {clip.start} to {clip.end} s confirmed"
            return {"start": clip.start, "end": clip.end, "fault": ["unconfirmed", detail],
                    "timeline": None, "candidates": []}  # fmt: skip
        roles = self._config.write.roles
        written = await _all([self._written(role, watched) for role in roles])
        candidates = [candidate for of_role in written for candidate in of_role]
        faults = await self._checked(candidates, watched)
        self._accepted += faults.count(None)
        self._rejected += len(faults) - faults.count(None)
        return {
            "start": watched.clip.start,
            "end": watched.clip.end,
            "fault": None,
            "timeline": watched.timeline.data(),
            "candidates": [
                {"role": candidate.role, **candidate.data(), "fault": wrong}
                for candidate, wrong in zip(candidates, faults, strict=True)
            ],
        }

    async def _written(self, role: str, watched: ConfirmedClip) -> list[Candidate]:
        """The candidates that the model writes for a role."""
        count = len(watched.clip.pictures)
        data = {
            "role": role,
            "instruction": self._prompts.roles[role],
            "number": self._config.write.per_role,
            "seconds": count,
            "words_a_second": self._config.write.pace,
            **watched.timeline.data(),
        }
        speech = watched.clip.speech(0, count - 1)
        reply = await self.model.ask("write", data | ({"speech": speech} if speech else {}))
        most = self._config.write.per_role
        return [candidate_of(role, sample) for sample in reply["samples"][:most]]

    async def _checked(
        self, candidates: list[Candidate], watched: ConfirmedClip
    ) -> list[tuple[str, str] | None]:
        """The fault of each candidate, or None: first its own, then duplicates, then the models'
        checks of those that are left."""
        seconds = len(watched.clip.pictures)
        wrong: list[tuple[str, str] | None] = []
        for number, candidate in enumerate(candidates):
            found = fault(candidate, seconds, self._config.write.pace)
            others = [c for c, w in zip(candidates[:number], wrong, strict=True) if w is None]
            double = duplicate_of(candidate, others, self._config.check.similar)
            wrong.append(found or (("duplicate", f"of {double!r}") if double else None))
        check = Check(watched, self.model, self._prompts, self._config)
        open_ = [number for number, found in enumerate(wrong) if found is None]
        verdicts = await _all([check.fault(candidates[number]) for number in open_])
        for number, verdict in zip(open_, verdicts, strict=True):
            wrong[number] = verdict
        return wrong


async def _all(work: Sequence[Any]) -> list[Any]:
    """The results of all coroutines. Where one fails, the others run to their end before the error
    is raised: their requests are paid for, and their replies are kept."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return list(results)
