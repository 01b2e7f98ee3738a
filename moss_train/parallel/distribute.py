"""One replica's share of a global batch: read by its leader, handed to all its ranks.

Every tensor x pipeline rank of a replica gets all the text (it is small) and its share of the
frames (they are large), as bytes; see exchange.py for what happens to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.batch import IGNORED_LABEL, MicroBatch
from moss_train import hardware
from moss_train.parallel.groups import Groups


@dataclass
class TextBatch:
    """A microbatch without its pixels, on the host. Rows are padded to one length in a step."""

    tokens: Tensor  # int64 [B, S]
    labels: Tensor  # int64 [B, S], not shifted
    lengths: Tensor  # int64 [B], tokens without padding
    frame_rows: Tensor  # int64 [N]
    frame_positions: Tensor  # int64 [N]
    ratio_ids: Tensor  # int64 [N]


@dataclass
class StepBatch:
    """What a rank works on in one optimizer step.

    frames: this rank's share of the replica's frames, uint8 `[n, T, 3, h, w]`, on the device.
    ratio_ids: of this rank's share `[n]`, on the device.
    counts: frames of each rank's share, in order of rank in the replica.
    keys, skipped: known on the leader.
    """

    microbatches: list[TextBatch]
    frames: Tensor
    ratio_ids: Tensor
    counts: list[int]
    keys: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)


def even_shares(total: int, ranks: int) -> list[int]:
    """`total` frames over `ranks`, within one of even."""
    return [total // ranks + (rank < total % ranks) for rank in range(ranks)]


def read_step(
    loader: Iterator[MicroBatch] | None,
    microbatches: int,
    pad_multiple: int,
    frame_shape: tuple[int, ...],
    groups: Groups,
    shares: int,
) -> StepBatch:
    """Reads (on the leader) and distributes the next step of this replica. A collective.

    Args:
        loader: of this replica; None on all ranks but the leader.
        frame_shape: `(T, 3, h, w)`.
        shares: ranks among which the frames are split: all of the replica, or its pipeline ranks
            where the tower is sharded over tensor ranks.
    """
    batches = []
    if groups.is_leader:
        assert loader is not None
        batches = [next(loader) for _ in range(microbatches)]
    text = _broadcast(_pack(batches, pad_multiple) if batches else None, groups)
    step = _unpack(text, microbatches)
    ratio_ids = torch.cat([batch.ratio_ids for batch in step])
    counts = even_shares(len(ratio_ids), shares)
    share = groups.replica.rank() * shares // groups.replica.size()
    frames = _scatter(batches, counts, frame_shape, groups)
    first = sum(counts[:share])
    own = ratio_ids[first : first + counts[share]].to(hardware.device())
    keys = [key for batch in batches for key in batch.keys]
    return StepBatch(step, frames, own, counts, keys, _sum_skipped(batches))


def _sum_skipped(batches: list[MicroBatch]) -> dict[str, int]:
    skipped: dict[str, int] = {}
    for batch in batches:
        for reason, count in batch.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
    return skipped


def _pack(batches: list[MicroBatch], pad_multiple: int) -> Tensor:
    """All text of a step as one int64 vector: header, then the microbatches."""
    rows = batches[0].tokens.shape[0]
    longest = max(batch.tokens.shape[1] for batch in batches)
    length = -(-longest // pad_multiple) * pad_multiple
    parts = [torch.tensor([rows, length, *(len(b.frame_rows) for b in batches)])]
    for batch in batches:
        pad = (0, length - batch.tokens.shape[1])
        parts += [
            torch.nn.functional.pad(batch.tokens, pad).flatten(),
            torch.nn.functional.pad(batch.labels, pad, value=IGNORED_LABEL).flatten(),
            batch.lengths,
            batch.frame_rows,
            batch.frame_positions,
            batch.aspect_ratio_ids,
        ]
    return torch.cat(parts)


def _unpack(text: Tensor, microbatches: int) -> list[TextBatch]:
    rows, length, *counts = text[: 2 + microbatches].tolist()
    offset = 2 + microbatches
    batches = []

    def take(size: int) -> Tensor:
        nonlocal offset
        offset += size
        return text[offset - size : offset]

    for count in counts:
        batches.append(
            TextBatch(
                tokens=take(rows * length).view(rows, length),
                labels=take(rows * length).view(rows, length),
                lengths=take(rows),
                frame_rows=take(count),
                frame_positions=take(count),
                ratio_ids=take(count),
            )
        )
    return batches


def _broadcast(text: Tensor | None, groups: Groups) -> Tensor:
    if groups.replica.size() == 1:
        assert text is not None
        return text
    device, leader = hardware.device(), dist.get_global_rank(groups.replica, 0)
    size = torch.tensor([0 if text is None else len(text)], device=device)
    dist.broadcast(size, leader, group=groups.replica)
    sent = torch.empty(int(size), dtype=torch.int64, device=device) if text is None else text
    sent = sent.to(device)
    dist.broadcast(sent, leader, group=groups.replica)
    return sent.cpu()


def _scatter(
    batches: list[MicroBatch], counts: list[int], frame_shape: tuple[int, ...], groups: Groups
) -> Tensor:
    """Sends each rank its share, the microbatches' frames in order."""
    device, size = hardware.device(), groups.replica.size()
    frames = torch.cat([batch.frames for batch in batches]).to(device) if batches else None
    if size == 1 or sum(counts) == 0:
        return torch.empty(0, *frame_shape, dtype=torch.uint8) if frames is None else frames
    out = torch.empty(max(counts), *frame_shape, dtype=torch.uint8, device=device)
    per_share = size // len(counts)
    parts = None
    if frames is not None:
        parts = [
            torch.cat((part, part.new_zeros(max(counts) - len(part), *frame_shape)))
            for part in frames.split(counts)
            for _ in range(per_share)
        ]
    dist.scatter(out, parts, src=dist.get_global_rank(groups.replica, 0), group=groups.replica)
    return out[: counts[groups.replica.rank() // per_share]]
