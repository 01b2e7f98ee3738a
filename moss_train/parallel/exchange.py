"""The frame exchange: the vision encoder is data-parallel over all ranks of a replica.

1. encode: each rank runs the encoder on its share of the frames. The projected states are gathered,
   so that every rank has those of all frames, one tensor for each microbatch. These tensors are
   detached (leaves of the autograd graph): the cross-attention layers of every pipeline stage read
   their keys and values from them.
2. (megatron's schedules run the decoder; the gradient of the states adds up in their `.grad`.)
3. return_gradient: the gradients, of which each rank has a part (its stages, its heads), are summed
   and scattered to the ranks that encoded the frames, which run the encoder's backward pass.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moss_train.model.groups import Groups
from moss_train.model.normalize import normalize
from moss_train.model.projector import VisionEncoder, pooled_tokens
from moss_train.model_config import ModelConfig
from moss_train.parallel.distribute import StepBatch


class FrameExchange:
    """Encodes the frames of a step over the ranks of a replica. One step at a time."""

    def __init__(self, model: ModelConfig, encoder: VisionEncoder, groups: Groups):
        self.model, self.encoder, self.groups = model, encoder, groups
        trains = [name for name, p in encoder.named_parameters() if p.requires_grad]
        self.tower_trains = any(name.startswith("vision.") for name in trains)
        self.trains = bool(trains)
        self._own: Tensor | None = None  # this rank's projected share, with its graph
        self._states: list[Tensor] = []  # of each microbatch, detached
        self._counts: list[int] = []  # frames of each share

    @property
    def shares(self) -> int:
        """Ranks of the replica among which frames are split (the tower's tensor ranks share)."""
        return self.groups.replica.size() // self.groups.vision.tp.size()

    def encode(self, step: StepBatch) -> list[Tensor]:
        """States of each microbatch's frames `[N, T x P, H]`, detached. A collective."""
        parts = self.states(step).split([len(batch.ratio_ids) for batch in step.microbatches])
        wanted = self.trains and torch.is_grad_enabled()
        self._states = [part.detach().requires_grad_(wanted) for part in parts]
        return self._states

    def states(self, step: StepBatch) -> Tensor:
        """States of all frames of a step, in order. A collective."""
        chunks = [
            self._encode_chunk(frames, ratio_ids)
            for frames, ratio_ids in zip(
                step.frames.split(self.model.vision.frames_per_chunk),
                step.ratio_ids.split(self.model.vision.frames_per_chunk),
                strict=True,
            )
            if len(frames)
        ]
        self._own = torch.cat(chunks) if chunks else None
        self._counts = step.counts
        return self._gather(step.frames.shape[1])

    def _encode_chunk(self, frames: Tensor, ratio_ids: Tensor) -> Tensor:
        encoder, vision = self.encoder, self.model.vision
        dtype = encoder.vision.class_embedding.dtype

        def features(frames: Tensor) -> Tensor:
            return encoder.features(normalize(frames, ratio_ids, vision, dtype), ratio_ids)

        if not self.tower_trains:
            with torch.no_grad():
                x = features(frames)
        elif vision.recompute and torch.is_grad_enabled():
            x = checkpoint(features, frames, use_reentrant=False, preserve_rng_state=False)
        else:
            x = features(frames)
        with torch.set_grad_enabled(self.trains and torch.is_grad_enabled()):
            return encoder.projector(x)

    def _gather(self, tiles: int) -> Tensor:
        """This rank's share -> every rank's, in order of frames."""
        weight = self.encoder.projector.linear.weight
        shape = (tiles * pooled_tokens(self.model), self.model.text.hidden_size)
        own = weight.new_zeros(0, *shape) if self._own is None else self._own.detach()
        counts = self._counts
        if len(counts) == 1 or sum(counts) == 0:
            return own
        padded = torch.cat((own, own.new_zeros(max(counts) - len(own), *shape)))
        ranks = self.groups.replica.size()
        out = own.new_empty(ranks * max(counts), *shape)
        dist.all_gather_into_tensor(out, padded, group=self.groups.replica)
        # Tensor ranks that share a tower hold the same frames: take one of each.
        parts = out.view(ranks, max(counts), *shape)[:: ranks // len(counts)]
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def return_gradient(self) -> None:
        """Runs the encoder's backward pass from the gradients of the states. A collective."""
        states, own, self._states, self._own = self._states, self._own, [], None
        if not self.trains or sum(self._counts) == 0:
            return
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in states]
        gradient = self._scatter(torch.cat(gradients))
        if own is not None:
            torch.autograd.backward(own, gradient[: len(own)].to(own.dtype))

    def _scatter(self, gradient: Tensor) -> Tensor:
        """Sums over the replica in fp32; returns the part of this rank's frames."""
        counts, ranks = self._counts, self.groups.replica.size()
        if ranks == 1:
            return gradient
        gradient = gradient.float()
        parts = [
            torch.cat((part, part.new_zeros(max(counts) - len(part), *part.shape[1:])))
            for part in gradient.split(counts)
            for _ in range(ranks // len(counts))
        ]
        out = torch.empty_like(parts[0])
        dist.reduce_scatter_tensor(out, torch.cat(parts), group=self.groups.replica)
        return out
