"""Slots that were lost with their process, computed anew many at once: frames, or tokens, of
several go through the model together, then come the steps of others, then the next ones.

Those that came first are whole first: where 20 sessions move at once, the last one waits as long as
if all went on side by side, and the others do not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from inference.engine import rebuild
from inference.engine.engine import VISION_BATCH
from inference.engine.packed_runner import LONGEST_PASS
from inference.engine.rebuild import Outline
from inference.engine.slots import Slot
from inference.session.runner import Runner

# Frames and tokens that one turn computes, of all slots together: steps of others wait for it.
TURN_FRAMES = VISION_BATCH
TURN_TOKENS = LONGEST_PASS // 4


@dataclass(eq=False)
class _Lost:
    """A slot that is being rebuilt. frames, tokens: how many of them are computed."""

    outline: Outline
    images: Sequence[Tensor]  # of the frames in its ring, uint8 [3, tile, tile]
    frames: int = 0
    tokens: int = 0
    whole: Future[Slot] = field(default_factory=Future)
    slot: Slot | None = None

    @property
    def place(self) -> Slot:
        assert self.slot is not None
        return self.slot

    def next_tokens(self, most: int) -> list[int]:
        """The next tokens to compute, at most `most`, whose positions follow each other."""
        begin, at = self.tokens, self.outline.positions
        end = begin + 1
        while end < min(len(at), begin + most) and at[end] == at[end - 1] + 1:
            end += 1
        return self.outline.tokens[begin:end]


class Rebuilder:
    """Rebuilds lost slots of a runner's sessions. The engine's thread alone changes what it
    holds."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self._engine = runner, runner.engine
        self._lost: list[_Lost] = []  # in the order in which they came

    def slot(self, outline: Outline, images: Sequence[Tensor]) -> Slot:
        """A slot that goes on from where it was; waits until it can. EngineFull: none is free."""
        lost = _Lost(outline, images)
        self.runner.call(partial(self._begin, lost)).result()
        return lost.whole.result()

    def _begin(self, lost: _Lost) -> None:
        lost.slot = self._engine.on_all(rebuild.begin, lost.outline)
        self._lost.append(lost)
        if len(self._lost) == 1:
            self._go_on()

    def _go_on(self) -> None:
        """The next turn, after the steps of others."""
        self.runner.call(self._turn).add_done_callback(self._ended)

    def _ended(self, turn: Future[None]) -> None:
        error = turn.exception()
        if error is not None:  # the engine has ended
            for lost in self._lost:
                lost.whole.set_exception(error)
            self._lost.clear()

    def _turn(self) -> None:
        first = self._lost[0]
        if first.frames < len(first.images):
            self._add(self._some_frames(), self._add_frames)
        else:
            self._add(self._some_tokens(), self._add_tokens)
        for lost in [*self._lost]:
            if lost.frames == len(lost.images) and lost.tokens == len(lost.outline.tokens):
                self._finish(lost)
        if self._lost:
            self._go_on()

    def _some_frames(self) -> list[tuple[_Lost, int]]:
        """Which slots get how many frames in this turn."""
        room, parts = TURN_FRAMES, []
        for lost in self._lost:
            count = min(room, len(lost.images) - lost.frames)
            if count:
                parts.append((lost, count))
                room -= count
        return parts

    def _some_tokens(self) -> list[tuple[_Lost, int]]:
        """Which slots get how many tokens in this turn, of those whose frames are all computed."""
        room, parts = TURN_TOKENS, []
        for lost in self._lost:
            ready = lost.frames == len(lost.images) and lost.tokens < len(lost.outline.tokens)
            count = len(lost.next_tokens(room)) if ready and room else 0
            if count:
                parts.append((lost, count))
                room -= count
        return parts

    def _add(
        self,
        parts: Sequence[tuple[_Lost, int]],
        work: Callable[[Sequence[tuple[_Lost, int]]], None],
    ) -> None:
        """Computes these parts together. Where that fails, each is tried alone, and what fails
        again is given up."""
        try:
            if parts:
                work(parts)
            return
        except Exception as error:
            if not self._engine.recovers():
                raise
            if len(parts) == 1:
                self._give_up(parts[0][0], error)
                return
        self._engine.free_memory()
        for part in parts:
            self._add([part], work)

    def _add_frames(self, parts: Sequence[tuple[_Lost, int]]) -> None:
        images = [image for lost, n in parts for image in lost.images[lost.frames :][:n]]
        features = self._engine.encode(images)
        for lost, count in parts:
            own, features = features[:count], features[count:]
            self._engine.on_all(rebuild.add_frames, lost.place, lost.frames, own)
            lost.frames += count

    def _add_tokens(self, parts: Sequence[tuple[_Lost, int]]) -> None:
        self._engine.on_all(
            rebuild.add_tokens,
            [
                (lost.place, lost.next_tokens(count), lost.outline.positions[lost.tokens])
                for lost, count in parts
            ],
        )
        for lost, count in parts:
            lost.tokens += count

    def _finish(self, lost: _Lost) -> None:
        end = lost.outline.position, lost.outline.pending
        try:
            self._engine.on_all(rebuild.finish, lost.place, *end)
        except Exception as error:
            return self._give_up(lost, error)
        self._lost.remove(lost)
        lost.whole.set_result(lost.place)

    def _give_up(self, lost: _Lost, error: Exception) -> None:
        self._lost.remove(lost)
        lost.whole.set_exception(error)  # nobody must wait for it, whatever comes
        self._engine.close(lost.place)
