"""The loss and its gradient where two tensor ranks share the vocabulary."""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch import Tensor

from moss_train import hardware
from moss_train.model.kernels import Statistics
from moss_train.model.loss import LossOptions, find_targets, weighted_loss

VOCAB, LENGTH = 48, 12
OPTIONS = {
    "plain": LossOptions(11, 0.1),
    "smooth": LossOptions(11, 0.1, label_smoothing=0.2),
    "z": LossOptions(11, 0.1, z_loss=0.01),
    "both": LossOptions(11, 0.1, label_smoothing=0.1, z_loss=0.1),
    "balanced": LossOptions(11, 0.1, focal_gamma=2.0),
    "balanced_both": LossOptions(11, 0.1, label_smoothing=0.1, z_loss=0.1, focal_gamma=2.0),
}
# Beside plain torch, where Triton is, its kernel.
KERNELS: dict[str, Statistics | None] = {"": None}
if find_spec("triton") is not None:
    from moss_train.model.triton_kernels import statistics

    KERNELS[" by a kernel"] = statistics
# a_k of words, silence and begins: numbers that no batch gives, told apart by every mistake.
STATE_WEIGHTS = [1.0, 0.6, 3.0]


def batch() -> tuple[Tensor, Tensor]:
    """Logits `[n, V]` of some size, and the tokens to predict `[n]`, in both halves of V."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, VOCAB, (LENGTH,), generator=generator)
    tokens[[2, 5]] = 11
    return 5 * torch.randn(LENGTH, VOCAB, generator=generator) + 3, tokens


def gradient(
    logits: Tensor,
    tokens: Tensor,
    options: LossOptions,
    group: dist.ProcessGroup,
    kernel: Statistics | None = None,
) -> tuple[float, Tensor]:
    """Loss per 7 labels, and the gradient of this rank's columns."""
    own = logits.chunk(group.size(), 1)[group.rank()].clone().requires_grad_()
    labels = torch.cat((tokens[:1], tokens))  # the first is not a loss position
    targets = find_targets(labels, [len(labels)], options, frame_positions=tokens.new_zeros(0))
    targets.state_weights = torch.tensor(STATE_WEIGHTS)
    # A copy: megatron's cross entropy and the kernel work in place.
    loss = weighted_loss((own * 1)[:, None], targets, torch.tensor(7.0), group, kernel)
    loss.backward()
    assert own.grad is not None
    return loss.item(), own.grad


def hits(logits: Tensor, tokens: Tensor, group: dist.ProcessGroup) -> int:
    """Labels that are the likeliest token; half of them are made so."""
    logits = logits.clone()
    logits[::2].scatter_(1, tokens[::2, None], 100.0)
    labels = torch.cat((tokens[:1], tokens))
    targets = find_targets(labels, [len(labels)], LossOptions(11, count_hits=True))
    own = logits.chunk(group.size(), 1)[group.rank()].clone()
    weighted_loss(own[:, None], targets, torch.tensor(7.0), group)
    assert targets.hits is not None
    return int(targets.hits)


def main() -> None:
    hardware.activate("cpu")
    dist.init_process_group("gloo")
    from moss_train.config import ParallelConfig
    from moss_train.parallel.process_groups import build_groups
    from tests.torchrun import save_result

    groups = build_groups(ParallelConfig(tensor=2), seed=1)
    for name, options in OPTIONS.items():
        for kind, kernel in KERNELS.items():
            save_result(name + kind, gradient(*batch(), options, groups.decoder.tp, kernel))
    save_result("hits", hits(*batch(), groups.decoder.tp))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
