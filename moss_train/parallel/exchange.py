"""The frame exchange: the vision encoder is data-parallel over all ranks of a replica.

1. encode: each rank runs the encoder on its share of the frames, some at a time (a *chunk*). The
   projected states are gathered, so that every rank has those of all frames, one tensor for each
   microbatch. These tensors are detached (leaves of the autograd graph): the cross-attention layers
   of every pipeline stage read their keys and values from them.
2. (megatron's schedules run the decoder; the gradient of the states adds up in their `.grad`.)
3. collect: the gradients, of which each rank has a part (its stages, its heads), are summed in fp32
   at the rank that encoded the frames: without a pipeline each time that a microbatch has passed.
4. return_gradient: the ranks run the encoder's backward pass, chunk by chunk. Where the tower is
   recomputed, the activations of a rank's first chunks alone were kept (`model.vision.kept_frames`,
   by default of none): they are freed before the others are there, one chunk's at a time. Each
   chunk is a backward pass of its own, after which megatron adds the parameters' gradients in fp32;
   in one pass over many chunks autograd would add them in the parameters' type, which for bf16 and
   hundreds of chunks is off by a quarter.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from moss_train.model.groups import Groups
from moss_train.model.normalize import normalize
from moss_train.model.projector import VisionEncoder, pooled_tokens
from moss_train.model_config import MOST_FRAMES_PER_CHUNK, ModelConfig
from moss_train.parallel.distribute import StepBatch


class FrameExchange:
    """Encodes the frames of a step over the ranks of a replica. One step at a time."""

    def __init__(
        self,
        model: ModelConfig,
        encoder: VisionEncoder,
        groups: Groups,
        chunk: int = MOST_FRAMES_PER_CHUNK,
    ):
        """chunk: frames that are encoded at once."""
        self.chunk = chunk
        self.model, self.encoder, self.groups = model, encoder, groups
        trains = [name for name, p in encoder.named_parameters() if p.requires_grad]
        self.tower_trains = any(name.startswith("vision.") for name in trains)
        self.trains = bool(trains)
        # Of this rank's share: frames, aspect-ratio ids, states with their graph; None: to be
        # encoded again.
        self._chunks: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.kept_frames = 0  # those of the first of them, where others are encoded again
        self._states: list[Tensor] = []  # of each microbatch, detached
        self._counts: list[int] = []  # frames of each share
        self._begun = 0  # microbatches
        self._collected = 0  # microbatches
        self._gradients: list[Tensor] = []  # of this rank's frames, in order

    @property
    def shares(self) -> int:
        """Ranks of the replica among which frames are split (the tower's tensor ranks share)."""
        return self.groups.replica.size() // self.groups.vision.tp.size()

    def encode(self, step: StepBatch) -> list[Tensor]:
        """States of each microbatch's frames `[N, T x P, H]`, detached. A collective."""
        parts = self.states(step).split([len(batch.ratio_ids) for batch in step.microbatches])
        needs_grad = self.trains and torch.is_grad_enabled()
        self._states = [part.detach().requires_grad_(needs_grad) for part in parts]
        self._begun = self._collected = 0
        return self._states

    def states(self, step: StepBatch) -> Tensor:
        """States of all frames of a step, in order. A collective."""
        needs_grad = self.trains and torch.is_grad_enabled()
        again = needs_grad and self.tower_trains and self.model.vision.recompute
        size, out, first = self.chunk, [], 0
        self.kept_frames = self.model.vision.kept_of(len(step.frames), size) if again else 0
        self._chunks, self._counts = [], step.counts
        for frames, ratio_ids in zip(
            step.frames.split(size), step.ratio_ids.split(size), strict=True
        ):
            if not len(frames):
                continue
            once = not again or first < self.kept_frames
            first += len(frames)
            with torch.set_grad_enabled(needs_grad and once):
                states = self._encode(frames, ratio_ids)
            out.append(states.detach())
            if needs_grad:
                self._chunks.append((frames, ratio_ids, states if once else None))
        return self._gather(out, step.frames.shape[1])

    def _encode(self, frames: Tensor, ratio_ids: Tensor) -> Tensor:
        """States of some frames. With their graph, where gradients are enabled."""
        encoder = self.encoder
        dtype = encoder.vision.class_embedding.dtype
        with torch.set_grad_enabled(self.tower_trains and torch.is_grad_enabled()):
            pixels = normalize(frames, ratio_ids, self.model.vision, dtype)
            features = encoder.features(pixels, ratio_ids)
        return encoder.projector(features)

    def _gather(self, parts: list[Tensor], tiles: int) -> Tensor:
        """Gathers all ranks' shares of the states: every rank gets them in order of frames."""
        weight = self.encoder.projector.linear.weight
        shape = (tiles * pooled_tokens(self.model), self.model.text.hidden_size)
        own = torch.cat(parts) if parts else weight.new_zeros(0, *shape)
        counts = self._counts
        if len(counts) == 1 or sum(counts) == 0:
            return own
        padded = torch.cat((own, own.new_zeros(max(counts) - len(own), *shape)))
        # Tensor ranks that share a tower hold the same frames: each gathers them of its stages.
        shared = self.groups.vision.tp.size() > 1
        out = own.new_empty(len(counts) * max(counts), *shape)
        dist.all_gather_into_tensor(
            out, padded, group=self.groups.decoder.pp if shared else self.groups.replica
        )
        gathered = out.view(len(counts), max(counts), *shape)
        return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])

    def begin_microbatch(self) -> None:
        """The schedule begins one. Without a pipeline those before it have passed: a collective.

        In a pipeline each stage is at another microbatch then, and would wait for the others.
        """
        if self.groups.decoder.pp.size() == 1:
            self._collect(self._begun)
        self._begun += 1

    def return_gradient(self) -> None:
        """Runs the encoder's backward pass from the gradients of the states. A collective."""
        self._collect(len(self._states))
        self._states, chunks, gradients = [], self._chunks, self._gradients
        self._chunks, self._gradients = [], []
        first = 0
        while chunks:
            frames, ratio_ids, states = chunks.pop(0)
            if states is None:
                states = self._encode(frames, ratio_ids)
            gradient = _rows(gradients, first, first + len(frames))
            torch.autograd.backward(states, gradient)
            first += len(frames)
            del states  # before the next ones are encoded

    def _collect(self, until: int) -> None:
        """Sums the gradients of the microbatches before `until`, each frame's at its rank."""
        if not self.trains or sum(self._counts) == 0:
            return
        begin = sum(map(len, self._states[: self._collected]))
        states, self._collected = self._states[self._collected : until], until
        if not states:
            return
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in states]
        for x in states:
            x.grad = None  # freed once it is summed
        if self.groups.replica.size() == 1:
            self._gradients += gradients
            return
        first = 0  # frame of each share
        for share, count in enumerate(self._counts):
            part = _rows(gradients, first - begin, first + count - begin)
            first += count
            if len(part):
                self._sum_at(share, part)

    def _sum_at(self, share: int, gradient: Tensor) -> None:
        """Sums in fp32 over the replica; kept by the ranks that have the share."""
        group = self.groups.replica
        summed, ranks = gradient.float(), group.size() // self.shares
        if ranks == 1:
            dist.reduce(summed, dist.get_global_rank(group, share), group=group)
        else:  # tensor ranks share a tower
            dist.all_reduce(summed, group=group)
        if group.rank() // ranks == share:
            self._gradients.append(summed.to(gradient.dtype))


def _rows(parts: list[Tensor], first: int, last: int) -> Tensor:
    """Rows [first, last) of what `torch.cat(parts)` would be; bounds outside of it are cut."""
    slices = [*_slices(parts, first, last)] or [parts[0][:0]]
    return slices[0] if len(slices) == 1 else torch.cat(slices)


def _slices(parts: list[Tensor], first: int, last: int) -> Iterator[Tensor]:
    start = 0
    for part in parts:
        end = start + len(part)
        if max(first, start) < min(last, end):
            yield part[max(first - start, 0) : last - start]
        start = end
