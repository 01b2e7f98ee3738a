"""Passes of fixed shape: one token of every slot, or a pending token and a frame.

CUDA graphs and torch.compile need passes like these. What changes from step to step (tokens,
lengths, positions) is in one device tensor, which the host fills before a pass; sampling is part of
the pass. Idle slots take part: their keys and values are written behind their last token, where
their next token overwrites them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from inference.engine.batches import StaticBatch
from inference.engine.cache import KVCache, put_frames
from inference.engine.sampling import Draw, Sampler
from inference.engine.slots import Slot, Step
from inference.engine.upload import upload
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration

WARM_UP = 3  # passes before a capture, in which libraries choose their kernels


class GraphRunner:
    """Runs steps that fit, each kind as one pass.

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
        self.all = torch.arange(count, device=device)
        self.compute: Callable[[int, Draw], Tensor] = self._compute
        if compile:
            self.compute = torch.compile(self._compute, dynamic=False)
        self.captured: dict[tuple[int, Draw], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def capture(self) -> None:
        """Captures all graphs, before a session is open: a capture stops everything else for a
        quarter of a second."""
        if self.graphs:
            pool = torch.cuda.graph_pool_handle()  # only one of them runs at a time
            for count in (1, 2):
                for draw in Draw:
                    self.captured[count, draw] = self._capture(count, draw, pool)

    def divide(self, steps: Sequence[Step]) -> tuple[list[list[Step]], list[Step]]:
        """Those that fit, by kind (the pending token alone, or with one frame after it), and the
        others."""
        kinds: dict[int, list[Step]] = {}
        rest = []
        for step in steps:
            fits = step.sample and step.slot.pending is not None
            if fits and list(step.tokens) in ([], [self.model.config.image_token_index]):
                kinds.setdefault(len(step.tokens), []).append(step)
            else:
                rest.append(step)
        return list(kinds.values()), rest

    def run(self, steps: Sequence[Step]) -> Tensor:
        """The sampled tokens of steps of one kind, on the device; nothing waits for them."""
        count = 1 + len(steps[0].tokens)
        host = torch.zeros(4, self.cache.slots, dtype=torch.long)
        for step in steps:
            slot = step.slot
            pending = slot.pending
            assert pending is not None
            tokens = [pending, *step.tokens]
            if step.frames:
                put_frames(self.cache, slot, tokens, step.frames)
            column = [slot.length, slot.position, *tokens]
            host[: len(column), slot.index] = torch.tensor(column)
        busy = [step.slot.index for step in steps]
        for index, slot in self.slots.items():
            if index not in busy:  # its keys and values go behind its last token
                host[:2, index] = torch.tensor([slot.length, slot.position])
        self.inputs.copy_(upload(host, self.cache.device))
        draw = max(step.slot.sampling.draw for step in steps)
        out = self._run(count, draw)[upload(busy, self.cache.device)]
        for step in steps:
            step.slot.append([step.slot.pending, *step.tokens])  # type: ignore[list-item]
            self.cache.commit_eviction(step.slot)
        return out

    def _run(self, count: int, draw: Draw) -> Tensor:
        if not self.graphs:
            return self.compute(count, draw)
        graph, out = self.captured[count, draw]
        graph.replay()
        return out

    @torch.inference_mode()
    def _capture(self, count: int, draw: Draw, pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.compute(count, draw)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            out = self.compute(count, draw)
        return graph, out

    def _compute(self, count: int, draw: Draw) -> Tensor:
        """Tokens sampled for all slots `[slots]`, from `self.inputs` alone."""
        length, position = self.inputs[0], self.inputs[1]
        decoder = self.model.model.language_model
        batch = StaticBatch(self.cache, count, length, position)
        x = decoder.embed_tokens(self.inputs[2 : 2 + count].T)  # [slots, count, H]
        x = decoder(x, batch.positions, batch.tokens, batch.frames)[:, -1]
        return self.sampler(self.model.lm_head(x), self.all, position + count, draw)
