"""Gradients that cross ranks, after the schedule and before the optimizer."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from moss_train.model.groups import Groups
from moss_train.parallel.data_parallel import DataParallel


def reduce_gradients(
    chunks: list[DataParallel], encoder: DataParallel | None, groups: Groups
) -> None:
    """Sums gradients over the replicas (decoder) and over all ranks (vision encoder).

    The sums are not averaged: the loss is already divided by the global count of labels.
    Replicated decoder parameters that each tensor rank sees a part of (q_norm and k_norm, whose
    heads are split; under sequence parallelism norms and gates too) are summed over tensor ranks.
    """
    for chunk in chunks:
        chunk.finish_grad_sync()
    if groups.decoder.tp.size() > 1:
        partial = [
            parameter.main_grad
            for chunk in chunks
            for parameter in chunk.module.parameters()
            if parameter.requires_grad and getattr(parameter, "partial_over_tensor", False)
        ]
        _sum_together(partial, groups.decoder.tp)
    if encoder is not None:
        encoder.finish_grad_sync()


def _sum_together(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    if not tensors:
        return
    flat = _flatten_dense_tensors(tensors)
    dist.all_reduce(flat, group=group)
    for tensor, summed in zip(tensors, _unflatten_dense_tensors(flat, tensors), strict=True):
        tensor.copy_(summed)
