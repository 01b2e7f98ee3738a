"""Passes of fixed shape: one token of some slots, a pending token and a frame, or a short prompt.

CUDA graphs and torch.compile need passes like these. What changes from step to step (slots, tokens,
lengths, positions) is in one device tensor, which the host fills before a pass. A step that fits no
shape is padded to the next larger one: a row too many repeats the first row, and so writes what
that writes; a token too many is written behind the last one, where the slot's next token
overwrites it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from data_pipeline.progress import Progress
from inference.engine.cache import KVCache, put_frames
from inference.engine.cache_sizes import SPARE
from inference.engine.capture import Graph, Pool, Ranks, check_same, or_without
from inference.engine.decode import FixedDecoder
from inference.engine.sampling import DRAWS, Draw, Sampler, draw_of
from inference.engine.slots import Slot, Step
from inference.engine.token_choice import choose_tokens
from inference.engine.upload import upload
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from inference.kernels.choose import Kernels
from inference.kernels.rows import Rows

ROWS = (1, 2, 4, 8, 12, 16, 24, 32)  # slots in a pass
PROMPTS = (8, 16, 32, 64, SPARE)  # tokens of a prompt, of one slot
HEAD = 4  # rows of the input before its tokens: slot, length, position, last token


@dataclass(frozen=True)
class Shapes:
    """The shapes of an engine's passes.

    rows: slots of a pass. counts: tokens of a slot in it: the pending one, one and a frame, and
    prompts, of one slot alone.
    """

    rows: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, slots: int, any_rows: bool) -> Shapes:
        """slots: of the engine. any_rows: a pass takes a choice of them, or a prompt; else all."""
        rows = [rows for rows in ROWS if rows < slots and any_rows]
        return cls((*rows, slots), (1, 2, *(PROMPTS if any_rows else ())))

    @property
    def kinds(self) -> list[tuple[int, int]]:
        """Tokens and slots of each pass, the largest first: in the memory of its graph the others
        have room."""
        kinds = [(count, rows) for count in self.counts for rows in self.rows]
        kinds = [(count, rows) for count, rows in kinds if count <= 2 or rows == self.rows[0]]
        return sorted(kinds, key=math.prod, reverse=True)


class GraphRunner:
    """Runs steps that fit, each kind as one pass.

    Args:
        slots: the open ones by index; it is read at each pass.
        kernels: what a pass is made of. Where they cannot read a choice of slots (plain torch),
            each pass has a row for every slot, and prompts do not fit.
        attend_all: EngineConfig's tokens_before_first_frame.
        graphs: capture and replay CUDA graphs; False: the same passes without a graph.
        compile: passes are compiled with torch.compile.
    """

    def __init__(
        self,
        model: MossVideoForConditionalGeneration,
        cache: KVCache,
        sampler: Sampler,
        slots: Mapping[int, Slot],
        kernels: Kernels,
        *,
        attend_all: bool,
        graphs: bool,
        compile: bool,
    ):
        self.model, self.cache, self.sampler, self.slots = model, cache, sampler, slots
        self.decoder = FixedDecoder(model.model.language_model, cache, kernels)
        self.any_rows, self.attend_all, self.graphs = kernels.any_rows, attend_all, graphs
        most, device = cache.slots, cache.device
        self.shapes = Shapes.of(most, self.any_rows)
        shape = HEAD + self.shapes.counts[-1], most
        self.inputs = torch.zeros(shape, dtype=torch.long, device=device)
        vocabulary = model.config.text_config.vocab_size
        self.logits = torch.zeros(most, vocabulary, dtype=cache.dtype, device=device)
        self.compute: Callable[[int, int], None] = self._compute
        if compile:
            self.compute = torch.compile(self._compute, dynamic=False)
        self.passes: dict[tuple[int, int], Graph] = {}
        self.draws: dict[tuple[int, Draw], tuple[Graph, Tensor]] = {}

    def divide(self, steps: Sequence[Step]) -> tuple[list[list[Step]], list[Step]]:
        """Divides steps into those that have a fixed shape, one list for each pass (a prompt is a
        pass of its own), and the others."""
        kinds: dict[int, list[Step]] = {}
        prompts, rest = [], []
        for step in steps:
            count = len(step.inputs)
            # Tokens before these frames attend them, too, which a fixed shape does not plan.
            attend_all = self.attend_all or step.attend_all
            first_frames = attend_all and step.slot.ring.count == 0 and step.frames
            if (
                first_frames
                or count > self.shapes.counts[-1]
                or len(step.frames) > step.slot.ring.room
            ):
                rest.append(step)
            elif count > 2:
                prompts.append([step])
            else:
                kinds.setdefault(count, []).append(step)
        return [*kinds.values(), *prompts], rest

    def run(self, steps: Sequence[Step]) -> Tensor | None:
        """A pass of steps of one kind: their sampled tokens on the device, for which nothing
        waits; None where no step samples."""
        count = next(c for c in self.shapes.counts if c >= len(steps[0].inputs))
        columns = [self._column(step, count) for step in steps]
        if self.any_rows:
            rows = next(r for r in self.shapes.rows if r >= len(steps))
            picked = list(range(len(steps)))
            columns += columns[:1] * (rows - len(steps))
        else:
            rows, picked = self.cache.slots, [step.slot.index for step in steps]
            columns = self._all_slots(dict(zip(picked, columns, strict=True)), count)
        host = torch.tensor(columns).T.contiguous()
        self.inputs[: HEAD + count, :rows].copy_(upload(host, self.cache.device))
        self._pass(count, rows)
        sampled = [(row, step) for row, step in zip(picked, steps, strict=True) if step.sample]
        out = None
        if sampled:
            operations = draw_of(step.slot.sampling for _, step in sampled)
            draw = partial(self._draw, rows, operations)
            own = [row for row, _ in sampled]
            tokens = choose_tokens(self.logits, [step for _, step in sampled], own, draw)
            # A copy: the next pass of this step may write its tokens to the same place.
            out = tokens[upload(picked, self.cache.device)]
        for step in steps:
            step.slot.append(step.inputs)
            self.cache.commit_eviction(step.slot)
        return out

    def _column(self, step: Step, count: int) -> list[int]:
        """A step's part of the input; its frames are written to the cache."""
        slot, tokens = step.slot, step.inputs
        if step.frames:
            put_frames(self.cache, slot, tokens, step.frames)
        head = [slot.index, slot.length, slot.position, len(tokens) - 1]
        return head + tokens + [0] * (count - len(tokens))

    def _all_slots(self, busy: dict[int, list[int]], count: int) -> list[list[int]]:
        """A column for every slot: the keys and values of idle ones go behind their last token."""
        columns = [[index, *[0] * (HEAD - 1 + count)] for index in range(self.cache.slots)]
        for index, slot in self.slots.items():
            columns[index][1:3] = slot.length, slot.position
        for index, column in busy.items():
            columns[index] = column
        return columns

    def _pass(self, count: int, rows: int) -> None:
        graph = self.passes.get((count, rows))
        if graph is None:
            self.compute(count, rows)
        else:
            graph.replay()

    def _draw(self, rows: int, draw: Draw) -> Tensor:
        if (rows, draw) not in self.draws:
            return self._sample(rows, draw)
        graph, tokens = self.draws[rows, draw]
        graph.replay()
        return tokens

    def _compute(self, count: int, rows: int) -> None:
        """Logits after the last token of each row, from `self.inputs` alone."""
        slot, length, position, last = self.inputs[:HEAD, :rows]
        where = Rows(slot if self.any_rows else None, length, position, count)
        hidden = self.decoder(self.inputs[HEAD : HEAD + count, :rows].T, where)  # [B, S, H]
        picked = (
            hidden[:, 0] if count == 1 else hidden[torch.arange(rows, device=last.device), last]
        )
        self.logits[:rows] = self.model.lm_head(picked)

    def _sample(self, rows: int, draw: Draw) -> Tensor:
        slot, _, position, last = self.inputs[:HEAD, :rows]
        return self.sampler(self.logits[:rows], slot, position + last + 1, draw)

    @torch.inference_mode()
    def capture(self, ranks: Ranks) -> None:
        """Captures all graphs, on all ranks at once, before a session is open: a capture stops
        everything else for a quarter of a second. Where it fails, or a graph computes something
        else than the pass without it, passes run without graphs, and a line says so."""
        if not self.graphs:
            return
        kinds, rows = self.shapes.kinds, self.shapes.rows[::-1]
        progress = Progress("CUDA graphs", len(kinds) + len(rows) * len(DRAWS), "graphs")
        pool = Pool(self.inputs.device, ranks)  # only one of them runs at a time
        with or_without("passes", ranks, self.passes, self.draws):
            for kind in kinds:
                self.passes[kind] = pool.capture(partial(self.compute, *kind))[0]
                self._check(kind, ranks)
                progress.step()
            for count, draw in product(rows, reversed(DRAWS)):
                self.draws[count, draw] = pool.capture(partial(self._sample, count, draw))
                progress.step()
        progress.end()

    def release(self) -> None:
        """Frees all graphs."""
        self.passes.clear()
        self.draws.clear()

    def _check(self, kind: tuple[int, int], ranks: Ranks) -> None:
        """Raises GraphError where a graph's logits are not those of the pass without it."""
        self.inputs.fill_(1)
        self.inputs[:3].zero_()
        self._compute(*kind)
        expected = self.logits[: kind[1]].clone()
        self.logits.zero_()
        self.passes[kind].replay()
        name, result = "{} tokens of {} slots".format(*kind), self.logits[: kind[1]]
        ranks.together(partial(check_same, name, result, expected))
