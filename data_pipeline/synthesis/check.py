"""Whether a candidate is right: by its timeline, and by what a model says that sees the frames.

The model that watches is asked to be the assistant: it sees the frames up to one second and what
has been said before, not what it should say. An answer stands where the model says the same at its
second, and does not say it a second before. All verdicts are votes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from data_pipeline.importers.timeline import TimedText
from data_pipeline.synthesis.candidate import Candidate, same_words
from data_pipeline.synthesis.config import SynthesisConfig
from data_pipeline.synthesis.model import Model, vote
from data_pipeline.synthesis.prompts import Prompts
from data_pipeline.synthesis.watch import ConfirmedClip


@dataclass(frozen=True)
class _Claim:
    """The votes `ask(number)` must agree on `expected`, else `reason` and `detail` hold."""

    ask: Callable[[int], Awaitable[bool]]
    expected: bool
    reason: str
    detail: str


class Check:
    """Checks the candidates of one clip."""

    def __init__(
        self, watched: ConfirmedClip, model: Model, prompts: Prompts, config: SynthesisConfig
    ) -> None:
        self._clip, self._timeline = watched.clip, watched.timeline
        self._model, self._prompts = model, prompts
        self._check, self._frames = config.check, config.cut.frames

    async def fault(self, candidate: Candidate) -> tuple[str, str] | None:
        """The reason and detail of the first claim that fails; None where all hold."""
        for claim in self._claims(candidate):
            verdict = await vote(claim.ask, self._check.lead, self._check.most_votes)
            if verdict is not claim.expected:
                return ("undecided" if verdict is None else claim.reason), claim.detail
        return None

    def _claims(self, candidate: Candidate) -> Iterator[_Claim]:
        """All claims about a candidate: first the cheap ones, and those that fail most often."""
        audit = partial(self._audit, candidate)
        yield _Claim(audit, True, "audit", "the timeline does not bear it out")
        for answer in candidate.answers:
            now, before = int(answer.second), int(answer.second) - 1
            text = repr(answer.text)
            is_said = partial(self._is_said, candidate, answer)
            yield _Claim(partial(is_said, now), True, "unseen", f"{text} at {now}")
            if before >= candidate.question_at(answer.second).second:  # it was asked for then
                yield _Claim(partial(is_said, before), False, "known_before", f"{text} at {before}")
        for second in self._silences(candidate):
            speaks = partial(self._speaks, candidate, second)
            yield _Claim(speaks, False, "not_silent", f"an answer is due at {second}")

    async def _audit(self, candidate: Candidate, number: int) -> bool:
        """Whether the timeline bears a candidate out, by a model without frames."""
        data = {
            "instruction": self._prompts.roles[candidate.role],
            "seconds": len(self._clip.pictures),
            **self._timeline.data(),
            **candidate.data(),
        }
        return bool((await self._model.ask("audit", data, number))["right"])

    async def _answer_at(self, candidate: Candidate, now: int, number: int) -> dict[str, Any]:
        """What a model says now that sees the frames, the questions and its earlier answers."""
        conversation = candidate.data()
        data = {
            "now": now,
            "questions": [one for one in conversation["questions"] if one["second"] <= now],
            "said": [one for one in conversation["answers"] if one["second"] < now],
        }
        frames = [(second, self._clip.pictures[second]) for second in self._frames_at(now)]
        reply: dict[str, Any] = await self._model.ask("say", data, number, frames)
        return reply

    async def _is_said(
        self, candidate: Candidate, answer: TimedText, now: int, number: int
    ) -> bool:
        """Whether the model says now what the answer says."""
        reply = await self._answer_at(candidate, now, number)
        if not reply["speak"] or not reply["text"].strip():
            return False
        if same_words(reply["text"], answer.text):
            return True
        question = candidate.question_at(answer.second).text
        data = {"question": question, "answers": [answer.text, reply["text"]]}
        return bool((await self._model.ask("same", data, number))["same"])

    async def _speaks(self, candidate: Candidate, now: int, number: int) -> bool:
        """Whether the model says anything now."""
        reply = await self._answer_at(candidate, now, number)
        return bool(reply["speak"] and reply["text"].strip())

    def _frames_at(self, now: int) -> list[int]:
        """Seconds whose frames are shown: all up to now; where these are more than cut.frames,
        half of the places go to the latest, the others are spread over the older ones."""
        most = self._frames
        if now < most:
            return list(range(now + 1))
        recent = most // 2
        older, count = now + 1 - recent, most - recent
        spread = [older * number // count for number in range(count)]
        return [*spread, *range(older, now + 1)]

    def _silences(self, candidate: Candidate) -> Iterator[int]:
        """Seconds at which the model must be silent: spread over the seconds from the first
        question to the clip's end that no other claim covers, the last of them first."""
        begin = int(candidate.questions[0].second)
        answers = {int(answer.second) for answer in candidate.answers}
        questions = {int(question.second) for question in candidate.questions}
        # An answer's claims cover its second and the one before it.
        checked = answers | {second - 1 for second in answers}
        if candidate.answers:
            checked |= questions
        free = [t for t in range(begin, len(self._clip.pictures)) if t not in checked]
        count = self._check.silences + 2 * (not candidate.answers)
        for number in range(min(count, len(free))):
            yield free[-1 - number * len(free) // count]
