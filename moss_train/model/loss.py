"""Next-token cross entropy with silence weight, for logits whose vocabulary is sharded."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor
from torch.nn.functional import cross_entropy

IGNORED = -100


@dataclass
class Targets:
    """Where a microbatch is judged: only these positions go through the output head.

    rows: index into the microbatch's T tokens, `[n]`.
    tokens: the token to predict there `[n]`.
    weights: factor on each position's cross entropy, fp32 `[n]`: `silence_weight` where it is
        silence, 0 for the one dummy of a microbatch without labels.
    count: labels, unweighted.
    """

    rows: Tensor
    tokens: Tensor
    weights: Tensor
    count: int


def find_targets(
    labels: Tensor, lengths: list[int], silence_id: int, silence_weight: float
) -> Targets:
    """Targets of packed sequences of `lengths`, padding behind them.

    `labels` `[T]` are not shifted: position t predicts label t + 1 of its own sequence.
    """
    following = labels.roll(-1)
    # Nothing follows the end of a sequence.
    following[[-1, *(end - 1 for end in accumulate(lengths))]] = IGNORED
    judged = following != IGNORED
    rows = judged.nonzero()[:, 0]
    tokens = following[judged]
    count = len(rows)
    if count == 0:  # the head must still take part in its collectives
        rows, tokens = rows.new_zeros(1), tokens.new_zeros(1)
    weights = torch.ones(len(rows)).masked_fill(tokens == silence_id, silence_weight)
    return Targets(rows, tokens, weights * (count > 0), count)


def weighted_loss(
    logits: Tensor, targets: Targets, total: Tensor, tensor_group: dist.ProcessGroup
) -> Tensor:
    """Sum of weight x cross entropy over the microbatch, divided by `total` labels.

    Args:
        logits: `[n, 1, V / tensor]`, this rank's columns.
        total: count of labels in the global batch, so that the sum over microbatches and ranks is
            the global loss whatever the layout.
        tensor_group: ranks over which the vocabulary is split.
    """
    logits = logits.float()
    if tensor_group.size() == 1:
        losses = cross_entropy(logits[:, 0], targets.tokens, reduction="none")
    else:
        losses = vocab_parallel_cross_entropy(logits, targets.tokens[:, None])[:, 0]
    return (losses * targets.weights).sum() / total
