"""The vision tower as CUDA graphs: a frame is many small kernels, which a host gives one by one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from data_pipeline.progress import Progress
from inference.engine.capture import Graph, Pool, Ranks, check_same, or_without

BATCHES = (1, 2, 4, 8, 16)  # frames; a number between is padded


class Tower:
    """Runs `encode`: normalized pictures `[n, 1, 3, size, size]` -> features `[n, P, H]`.

    Until `capture` it is `encode`; then each batch is a graph.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], size: int, device: torch.device):
        self.encode = encode
        self.shape, self.device = (BATCHES[-1], 1, 3, size, size), device
        self.pixels: Tensor | None = None  # where the graphs read
        self.graphs: dict[int, tuple[Graph, Tensor]] = {}

    def __call__(self, pixels: Tensor) -> Tensor:
        count = len(pixels)
        batch = next((batch for batch in BATCHES if batch >= count and batch in self.graphs), None)
        if batch is None or self.pixels is None:
            return self.encode(pixels)
        self.pixels[:count].copy_(pixels)
        graph, features = self.graphs[batch]
        graph.replay()
        return features[:count].clone()  # the next replay writes there

    @torch.inference_mode()
    def capture(self, ranks: Ranks) -> None:
        """Captures all batches, on all ranks at once. Where it fails, or a graph computes something
        else, frames are encoded without graphs, and a line says so."""
        self.pixels = torch.zeros(self.shape, device=self.device)
        progress = Progress("vision graphs", len(BATCHES), "graphs")
        pool = Pool(self.device, ranks)
        with or_without("frames", ranks, self.graphs):
            for batch in reversed(BATCHES):  # in whose memory the smaller ones have room
                self.graphs[batch] = pool.capture(partial(self.encode, self.pixels[:batch]))
                self.pixels.normal_()
                expected = self.encode(self.pixels[:batch])
                result = self(self.pixels[:batch].clone())
                ranks.together(partial(check_same, f"{batch} frames", result, expected))
                progress.step()
        progress.end()
