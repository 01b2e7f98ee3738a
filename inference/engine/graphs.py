"""Passes of fixed shape: one token of every slot, or a pending token and a frame.

CUDA graphs and torch.compile need passes like these. What changes from step to step (tokens,
lengths, positions) is in one device tensor, which the host fills before a pass; sampling is part of
the pass. Idle slots take part: their keys and values are written behind their last token, where
their next token overwrites them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from inference.engine.batches import StaticBatch
from inference.engine.cache import KVCache, put_frames
from inference.engine.sampling import Sampler
from inference.engine.slots import Slot, Step
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration

WARM_UP = 3  # passes before a capture, in which libraries choose their kernels


class GraphRunner:
    """Runs steps that fit; graphs are captured when first needed.

    Args:
        slots: the open ones by index; it is read at each pass.
        graphs: capture and replay CUDA graphs; False: the same passes without a graph.
        compile: passes are compiled with torch.compile.
    """

    def __init__(
        self,
        model: MossVideoForConditionalGeneration,
        cache: KVCache,
        sampler: Sampler,
        slots: Mapping[int, Slot],
        graphs: bool,
        compile: bool,
    ):
        self.model, self.cache, self.sampler = model, cache, sampler
        self.slots, self.graphs = slots, graphs
        count, device = cache.slots, cache.device
        # Rows: length, position, token, second token.
        self.inputs = torch.zeros(4, count, dtype=torch.long, device=device)
        self.host = torch.zeros(4, count, dtype=torch.long, pin_memory=device.type == "cuda")
        self.all = torch.arange(count, device=device)
        self.compute: Callable[[int, bool], Tensor] = self._compute
        if compile:
            self.compute = torch.compile(self._compute, dynamic=False)
        self.captured: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def fits(self, steps: Sequence[Step]) -> bool:
        """True if all steps are alike: the pending token alone, or with one frame after it."""
        image = self.model.config.image_token_index
        first = list(steps[0].tokens)
        return first in ([], [image]) and all(
            step.sample and step.slot.pending is not None and list(step.tokens) == first
            for step in steps
        )

    def run(self, steps: Sequence[Step]) -> list[int]:
        """The sampled tokens."""
        count = 1 + len(steps[0].tokens)
        self.host.zero_()
        for step in steps:
            slot = step.slot
            pending = slot.pending
            assert pending is not None
            tokens = [pending, *step.tokens]
            if step.frames:
                put_frames(self.cache, slot, tokens, step.frames)
            column = [slot.length, slot.position, *tokens]
            self.host[: len(column), slot.index] = torch.tensor(column)
        self._place_idle_slots({step.slot.index for step in steps})
        self.inputs.copy_(self.host, non_blocking=True)
        plain = all(step.slot.sampling.plain for step in steps)
        out = self._run(count, plain).tolist()  # waits for the device
        for step in steps:
            step.slot.append([step.slot.pending, *step.tokens])  # type: ignore[list-item]
            self.cache.commit_eviction(step.slot)
        return [out[step.slot.index] for step in steps]

    def _place_idle_slots(self, busy: set[int]) -> None:
        """Keys and values of idle slots go behind their last token."""
        for index, slot in self.slots.items():
            if index not in busy:
                self.host[0, index], self.host[1, index] = slot.length, slot.position

    def _run(self, count: int, plain: bool) -> Tensor:
        if not self.graphs:
            return self.compute(count, plain)
        if (count, plain) not in self.captured:
            self.captured[count, plain] = self._capture(count, plain)
        graph, out = self.captured[count, plain]
        graph.replay()
        return out

    def _capture(self, count: int, plain: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.compute(count, plain)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.compute(count, plain)
        return graph, out

    def _compute(self, count: int, plain: bool) -> Tensor:
        """Tokens sampled for all slots `[slots]`, from `self.inputs` alone."""
        length, position = self.inputs[0], self.inputs[1]
        decoder = self.model.model.language_model
        batch = StaticBatch(self.cache, count, length, position)
        x = decoder.embed_tokens(self.inputs[2 : 2 + count].T)  # [slots, count, H]
        x = decoder(x, batch.positions, batch.tokens, batch.frames)[:, -1]
        return self.sampler(self.model.lm_head(x), self.all, position + count, plain)
