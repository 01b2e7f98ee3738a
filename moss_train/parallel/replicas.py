"""Checks that ranks which hold the same parameters hold the same bits.

Where a gradient is not summed over all of them, they drift apart without an error.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moss_train import hardware
from moss_train.model.moss_video import MossVideo

PIECE = 1 << 24  # words that are summed at once: as 64 bits, those of an embedding are 4 GB
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_replicas(model: MossVideo, step: int) -> None:
    """A collective. Raises RuntimeError on all ranks where some of them differ."""
    differing = differing_replicas(model)
    if differing:
        raise RuntimeError(
            f"step {step}: ranks that should hold the same weights differ in {differing}: go on "
            "from the last checkpoint, and report this as a bug"
        )


def differing_replicas(model: MossVideo) -> list[str]:
    """Names of parameters whose replicas are not the same to the bit. A collective.

    Compared are the decoder's over data-parallel ranks and the encoder's over all ranks that hold
    the same part, and those of both that are not sharded over the tensor ranks that share a decoder
    or a tower, too: by checksums, in one reduction each.
    """
    groups = model.groups
    parameters = list(model.named_parameters())
    decoder = [(name, p) for name, p in parameters if name.startswith("decoder.")]
    encoder = [(name, p) for name, p in parameters if not name.startswith("decoder.")]
    names = [
        *_differing(decoder, groups.decoder.dp),
        *_differing(_whole(decoder), groups.decoder.tp),
        *_differing(encoder, groups.vision.dp),
        *_differing(_whole(encoder), groups.vision.tp),
    ]
    return sorted(set(names))


def _whole(parameters: list[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in parameters if not getattr(p, "tensor_model_parallel", False)]


def _differing(parameters: list[tuple[str, nn.Parameter]], group: dist.ProcessGroup) -> list[str]:
    if group.size() == 1 or not parameters:
        return []
    sums = torch.stack([_checksum(parameter.detach()) for _, parameter in parameters])
    lowest, highest = sums.to(hardware.device()), sums.to(hardware.device()).clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN, group=group)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    same = (lowest == highest).all(1).tolist()
    return [name for (name, _), equal in zip(parameters, same, strict=True) if not equal]


def _checksum(tensor: Tensor) -> Tensor:
    """Two int64 sums over the tensor's bits: of its words, and of their squares (both wrap)."""
    words = tensor.contiguous().view(_WORDS[tensor.element_size()]).flatten()
    return torch.stack([_sums(piece.long()) for piece in words.split(PIECE)]).sum(0)


def _sums(words: Tensor) -> Tensor:
    return torch.stack((words.sum(), (words * words).sum()))
