"""One replica's share of a global batch: read by its leader, handed to all its ranks.

Every tensor x pipeline rank of a replica gets all the text (it is small) and its share of the
frames (they are large), as bytes; see exchange.py for what happens to them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.batch import IGNORED_LABEL, EncodedSample, MicroBatch, Unlearned
from moss_train import hardware
from moss_train.model.groups import Groups
from moss_train.parallel.packing import Bounds, pack
from moss_train.transfer import concatenated, to_device


@dataclass
class TextBatch:
    """A microbatch without its pixels, on the host: B sequences one after the other.

    Padding follows the last one where the T of all microbatches must be equal (pipelines), or a
    multiple of `data.pad_multiple`.
    """

    tokens: Tensor  # int64 [T]
    labels: Tensor  # int64 [T], not shifted
    lengths: list[int]  # tokens of each sequence
    frame_sequences: Tensor  # int64 [N], the sequence of each frame
    frame_positions: Tensor  # int64 [N], in its sequence
    ratio_ids: Tensor  # int64 [N]


@dataclass
class StepBatch:
    """The part of one optimizer step that a rank works on.

    frames: this rank's share of the replica's frames, uint8 `[n, T, 3, h, w]`, on the device.
    ratio_ids: of this rank's share `[n]`, on the device.
    counts: frames of each rank's share, in order of rank in the replica.
    keys, skipped, unlearned: known on the leader; of the samples of the replica.
    """

    microbatches: list[TextBatch]
    frames: Tensor
    ratio_ids: Tensor
    counts: list[int]
    keys: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    unlearned: Unlearned = field(default_factory=Unlearned)


@dataclass
class HostStep:
    """A step of a replica in host memory: its text, and on the leader all of its frames.

    frames: uint8 `[N, T, 3, h, w]`, page-locked where there is a GPU; None where there are none.
    keys, skipped, unlearned: as in `StepBatch`.
    """

    microbatches: list[TextBatch]
    frames: Tensor | None
    keys: list[str]
    skipped: dict[str, int]
    unlearned: Unlearned


class NoMoreStepsError(dist.DistError):
    """The leader of the replica has stopped reading (`end_reading`): its error, if any, is why."""


def even_shares(total: int, ranks: int) -> list[int]:
    """`total` frames over `ranks`, within one of even."""
    return [total // ranks + (rank < total % ranks) for rank in range(ranks)]


def read_step(
    loader: Iterator[MicroBatch] | None,
    reads: int,
    bounds: Bounds,
    pad_multiple: int,
    frame_shape: tuple[int, ...],
    groups: Groups,
    shares: int,
) -> StepBatch:
    """`assemble`, then `distribute`: the next step of this replica."""
    step = assemble(loader, reads, bounds, pad_multiple, groups)
    return distribute(step, frame_shape, groups, shares)


def assemble(
    loader: Iterator[MicroBatch] | None,
    reads: int,
    bounds: Bounds,
    pad_multiple: int,
    groups: Groups,
) -> HostStep:
    """Reads the next step of this replica (on the leader) and hands its text to all ranks. A
    collective of `groups.host`: what else the replica does may go on beside it.

    The samples read are packed into microbatches anew, so that these are about equally long.

    Args:
        loader: of this replica; None on all ranks but the leader.
        reads: batches of the loader that make up this replica's share of the global batch.
        pad_multiple: microbatches are padded to a multiple of this, in tokens.

    Raises:
        NoMoreStepsError: on the others, where the leader calls `end_reading` instead.
    """
    samples: list[EncodedSample] = []
    keys: list[str] = []
    skipped: Counter[str] = Counter()
    unlearned = Unlearned()
    packed: list[list[EncodedSample]] = []
    if groups.is_leader:
        assert loader is not None
        for batch in (next(loader) for _ in range(reads)):
            keys += batch.keys
            skipped.update(batch.skipped)
            unlearned += batch.unlearned
            samples += batch.samples()
        packed = pack(samples, bounds)
    equal = groups.decoder.pp.size() > 1
    text = _broadcast(_serialize(packed, pad_multiple, equal) if packed else None, groups)
    pixels = [sample.frames for samples in packed for sample in samples]
    frames = concatenated(pixels) if pixels else None
    return HostStep(_deserialize(text), frames, keys, dict(skipped), unlearned)


def end_reading(groups: Groups) -> None:
    """Instead of the leader's `assemble`: that of the other ranks fails."""
    if groups.replica.size() > 1:
        leader = dist.get_global_rank(groups.replica, 0)
        dist.broadcast(torch.tensor([0]), leader, group=groups.host)


def distribute(
    step: HostStep, frame_shape: tuple[int, ...], groups: Groups, shares: int
) -> StepBatch:
    """Gives each rank its share of a step's frames. A collective of the replica.

    Args:
        frame_shape: `(T, 3, h, w)`.
        shares: ranks among which the frames are split: all of the replica, or its pipeline ranks
            where the tower is sharded over tensor ranks.
    """
    ratio_ids = torch.cat([batch.ratio_ids for batch in step.microbatches])
    counts = even_shares(len(ratio_ids), shares)
    share = groups.replica.rank() * shares // groups.replica.size()
    frames = _scatter(step.frames, counts, frame_shape, groups)
    first = sum(counts[:share])
    (own,) = to_device([ratio_ids[first : first + counts[share]]])
    return StepBatch(
        step.microbatches, frames, own, counts, step.keys, step.skipped, step.unlearned
    )


def _serialize(packed: list[list[EncodedSample]], pad_multiple: int, equal: bool) -> Tensor:
    """All text of a step as one int64 vector: sizes, then the microbatches (see `_deserialize`)."""
    sizes = [sum(len(sample.tokens) for sample in samples) for samples in packed]
    padded = [-(-size // pad_multiple) * pad_multiple for size in sizes]
    if equal:
        padded = [max(padded)] * len(padded)
    parts = [torch.tensor([len(packed)])]
    for samples, size, whole in zip(packed, sizes, padded, strict=True):
        pad = torch.zeros(whole - size, dtype=torch.int64)
        frames = [len(sample.frame_positions) for sample in samples]
        parts += [
            torch.tensor([whole, len(samples)]),
            torch.tensor([*(len(sample.tokens) for sample in samples), *frames]),
            *(sample.tokens for sample in samples),
            pad,
            *(sample.labels for sample in samples),
            pad + IGNORED_LABEL,
            *(sample.frame_positions for sample in samples),
            *(sample.aspect_ratio_ids for sample in samples),
        ]
    return torch.cat(parts)


def _deserialize(text: Tensor) -> list[TextBatch]:
    offset = 0

    def take(size: int) -> Tensor:
        nonlocal offset
        offset += size
        return text[offset - size : offset]

    batches = []
    for _ in range(int(take(1))):
        whole, rows = take(2).tolist()
        lengths, frames = take(rows).tolist(), take(rows)
        batches.append(
            TextBatch(
                tokens=take(whole),
                labels=take(whole),
                lengths=lengths,
                frame_sequences=torch.arange(rows).repeat_interleave(frames),
                frame_positions=take(int(frames.sum())),
                ratio_ids=take(int(frames.sum())),
            )
        )
    return batches


def _broadcast(text: Tensor | None, groups: Groups) -> Tensor:
    if groups.replica.size() == 1:
        assert text is not None
        return text
    leader = dist.get_global_rank(groups.replica, 0)
    size = torch.tensor([0 if text is None else len(text)])
    dist.broadcast(size, leader, group=groups.host)
    if not size:
        raise NoMoreStepsError("the replica's leader reads no more")
    sent = torch.empty(int(size), dtype=torch.int64) if text is None else text
    dist.broadcast(sent, leader, group=groups.host)
    return sent


def _scatter(
    frames: Tensor | None, counts: list[int], frame_shape: tuple[int, ...], groups: Groups
) -> Tensor:
    """Sends each rank its share of the frames, which the leader has."""
    device, size = hardware.device(), groups.replica.size()
    if frames is not None:
        frames = frames.to(device, non_blocking=True)
    if size == 1 or sum(counts) == 0:
        none = torch.empty(0, *frame_shape, dtype=torch.uint8, device=device)
        return none if frames is None else frames
    out = torch.empty(max(counts), *frame_shape, dtype=torch.uint8, device=device)
    per_share = size // len(counts)
    parts = None
    if frames is not None:
        starts = [0, *accumulate(counts)][:-1]
        shares = [_rows(frames, start, max(counts)) for start in starts]
        parts = [share for share in shares for _ in range(per_share)]
    dist.scatter(out, parts, src=dist.get_global_rank(groups.replica, 0), group=groups.replica)
    return out[: counts[groups.replica.rank() // per_share]]


def _rows(frames: Tensor, start: int, count: int) -> Tensor:
    """So many frames from `start` on: zeros beyond the last one. No copy but of those, since the
    leader has the frames of all the replica."""
    part = frames[start : start + count]
    missing = count - len(part)
    return torch.cat((part, part.new_zeros(missing, *part.shape[1:]))) if missing else part
