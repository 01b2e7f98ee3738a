"""Next-token cross entropy for logits whose vocabulary is sharded: silence weight or balanced
states (states.py), smoothing, z."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    reduce_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)
from torch import Tensor
from torch.nn.functional import cross_entropy

from data_pipeline.batch import IGNORED_LABEL
from moss_train.model.kernels import Statistics
from moss_train.model.states import WORD, label_states


@dataclass(frozen=True)
class LossOptions:
    """What the loss counts, and how much.

    silence_id, silence_weight: token id of `<|silence|>`, and the weight of its labels.
    label_smoothing: probability spread evenly over the vocabulary, 0 to 1.
    z_loss: factor on the squared logarithm of the softmax's denominator, which keeps it near 1.
    count_hits: also count the labels that are the likeliest token (`Targets.hits`).
    focal_gamma: of the loss `state_balanced` (states.py), which takes the place of
        `silence_weight`; None: `weighted`.
    """

    silence_id: int
    silence_weight: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    count_hits: bool = False
    focal_gamma: float | None = None


@dataclass
class Targets:
    """The loss positions of a microbatch, the only ones that go through the output head.

    positions: of the tokens before a label, among the microbatch's T tokens `[n]`.
    tokens: the token to predict there `[n]`.
    weights: factor on each position's cross entropy, fp32 `[n]`: `silence_weight` where it is
        silence, 0 for the one dummy of a microbatch without labels.
    count: labels, unweighted.
    states: of the labels (states.py), int64 `[n]`; None where the loss does not balance them.
    state_weights: of the three states in the global batch, fp32 `[3]`: set before the schedule.
    hits: how many of them the model holds for the likeliest token, where `options.count_hits` asks
        for it and the last stage has run.
    weighted: what the loss would be without balance, smoothing and z, where the states are balanced
        and the last stage has run.
    """

    on_device: ClassVar = ("positions", "tokens", "weights", "states")

    positions: Tensor
    tokens: Tensor
    weights: Tensor
    count: int
    options: LossOptions
    states: Tensor | None = None
    state_weights: Tensor | None = None
    hits: Tensor | None = None
    weighted: Tensor | None = None


def find_targets(
    labels: Tensor,
    lengths: list[int],
    options: LossOptions,
    frame_positions: Tensor | None = None,
) -> Targets:
    """Targets of packed sequences of `lengths`, padding behind them.

    `labels` `[T]` are not shifted: position t predicts label t + 1 of its own sequence.
    `frame_positions`: of the frames among the T tokens; balanced states need them.
    """
    following = labels.roll(-1)
    # Nothing follows the end of a sequence.
    following[[-1, *(end - 1 for end in accumulate(lengths))]] = IGNORED_LABEL
    has_label = following != IGNORED_LABEL
    positions = has_label.nonzero()[:, 0]
    tokens = following[has_label]
    count = len(positions)
    if count == 0:  # the head must still take part in its collectives
        positions, tokens = positions.new_zeros(1), tokens.new_zeros(1)
    weights = torch.ones(len(positions))
    weights = weights.masked_fill(tokens == options.silence_id, options.silence_weight)
    targets = Targets(positions, tokens, weights * (count > 0), count, options)
    if options.focal_gamma is not None:
        assert frame_positions is not None
        states = label_states(labels, lengths, frame_positions, options.silence_id)
        targets.states = states[positions + 1]
    return targets


def weighted_loss(
    logits: Tensor,
    targets: Targets,
    total: Tensor,
    tensor_group: dist.ProcessGroup,
    statistics: Statistics | None = None,
) -> Tensor:
    """Sum of weight x loss over the microbatch, divided by `total` labels: of `Targets.weights`, or
    of the states' weights and the focal factor.

    Args:
        logits: `[n, 1, V / tensor]`, this rank's columns.
        total: count of labels in the global batch, so that the sum over microbatches and ranks is
            the global loss whatever the layout.
        tensor_group: ranks over which the vocabulary is split.
        statistics: a kernel for them (kernels.py), which reads the logits as they are.
    """
    logits = logits if statistics else logits.float()
    rows, options = logits.squeeze(1), targets.options
    if options.count_hits:
        targets.hits = _hits(rows.detach(), targets, tensor_group)
    if options.label_smoothing or options.z_loss or statistics:
        losses, entropies = _regularized(rows, targets.tokens, tensor_group, options, statistics)
    elif tensor_group.size() == 1:
        losses = entropies = cross_entropy(rows, targets.tokens, reduction="none")
    else:
        losses = vocab_parallel_cross_entropy(logits, targets.tokens[:, None])[:, 0]
        entropies = losses
    if targets.states is None or not targets.count:
        return (losses * targets.weights).sum() / total
    targets.weighted = (entropies.detach() * targets.weights).sum() / total
    return (losses * _balance(entropies, targets)).sum() / total


def _balance(entropies: Tensor, targets: Targets) -> Tensor:
    """What each label weighs by its state and its probability p: `[n]` of -log p -> `[n]`.

    Nothing here is as large as the vocabulary: p comes from the cross entropy.
    """
    states, weights, gamma = targets.states, targets.state_weights, targets.options.focal_gamma
    assert states is not None
    assert weights is not None
    assert gamma is not None
    # 1 - p; below the bound it is a constant, for a power below 1 has no slope at 0.
    doubt = (-torch.expm1(-entropies)).clamp(min=1e-6)
    return weights[states] * torch.where(states == WORD, 1.0, doubt**gamma)


def _hits(logits: Tensor, targets: Targets, group: dist.ProcessGroup) -> Tensor:
    """Labels whose logit is the highest of the whole vocabulary: `[n, V / tensor]` -> scalar."""
    own, elsewhere = _own_columns(targets.tokens, logits.shape[1], group)
    picked = logits.gather(1, own[:, None])[:, 0].masked_fill(elsewhere, -torch.inf)
    best = _largest(torch.stack((picked, logits.amax(1))).float(), group)
    return (best[0] == best[1])[: targets.count].sum()


def _own_columns(tokens: Tensor, size: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Columns of `tokens` on this rank, which holds `size` of them; and which are elsewhere."""
    own = tokens - group.rank() * size
    elsewhere = (own < 0) | (own >= size)
    return own.masked_fill(elsewhere, 0), elsewhere


def _regularized(
    logits: Tensor,
    tokens: Tensor,
    group: dist.ProcessGroup,
    options: LossOptions,
    statistics: Statistics | None,
) -> tuple[Tensor, Tensor]:
    """Label smoothing and z-loss, whose sums run over the whole vocabulary (megatron's own
    smoothing takes means over a rank's part of it). `[n, V / tensor]`, `[n]` -> losses `[n]`, and
    the cross entropies in them `[n]`.
    """
    size = logits.shape[1]
    own, elsewhere = _own_columns(tokens, size, group)
    if statistics is None:
        peak = _largest(logits.detach().amax(1), group)
        exponentials = (logits - peak[:, None]).exp().sum(1)
        picked = logits.gather(1, own[:, None])[:, 0].masked_fill(elsewhere, 0.0)
        total = logits.sum(1)
    else:
        log_sums, picked, total = statistics(logits, own.masked_fill(elsewhere, -1))
        peak = _largest(log_sums.detach().clone(), group)
        exponentials = (log_sums - peak).exp()
    sums = torch.stack((exponentials, picked, total / (size * group.size())))
    if group.size() > 1:
        sums = reduce_from_tensor_model_parallel_region(sums, group=group)
    exponentials, target, mean = sums
    log_total = peak + exponentials.log()
    smoothing = options.label_smoothing
    expected = (1 - smoothing) * target + smoothing * mean
    losses = log_total - expected + options.z_loss * log_total.square()
    return losses, log_total - target


def _largest(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The largest of all ranks', in place."""
    if group.size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=group)
    return x
