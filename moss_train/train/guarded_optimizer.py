"""megatron's optimizer, with its decisions made on the device.

megatron reads the gradient norm (without Transformer Engine each gradient's) to decide whether to
clip, and its caller to decide whether to update: each time the host waits for the device, and the
device then for the host. Here norm, clipping and refusal are numbers that only the device reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor

from moss_train import hardware
from moss_train.train.adam import FusedShapeAdam

EPSILON = 1e-6  # added to the norm that gradients are divided by, as in megatron


class GuardedOptimizer(ChainedOptimizer):
    """Decides between the gradient norm and the update; without a synchronization."""

    @torch.no_grad()
    def update(self, refuses: Callable[[Tensor], Tensor]) -> Tensor:
        """Clips and updates. A collective.

        Args:
            refuses: from the gradient norm (fp64 scalar) to 1 where the weights must stay as they
                are, else 0 (fp32 scalar).

        Returns:
            The norm.
        """
        self.prepare_grads()  # always False: only loss scaling finds something there
        norm = self._norm()
        refused = refuses(norm)
        self._clip(norm)
        for adam in self.adams():
            adam.refused = refused
        self.step_with_ready_grads()
        return norm

    def adams(self) -> Iterator[FusedShapeAdam]:
        """The optimizers that do the work: one for each part of the model that trains here."""
        for part in self.chained_optimizers:
            if not getattr(part, "is_stub_optimizer", False):
                yield part.optimizer

    def _norm(self) -> Tensor:
        """Norm of all gradients, each counted once. A collective."""
        gradients = [
            gradient for part in self.chained_optimizers for gradient in _counted_gradients(part)
        ]
        square = torch.zeros(1, device=hardware.device())
        if gradients:
            norms = torch.stack(torch._foreach_norm(gradients))
            square = norms.norm()[None] ** 2.0
        dist.all_reduce(square, group=self.get_grad_stats_parallel_group())
        return square[0].double().sqrt()

    def _clip(self, norm: Tensor) -> None:
        for part in self.chained_optimizers:
            limit = part.config.clip_grad
            gradients = [p.grad for p in part.get_parameters() if p.grad is not None]
            if limit > 0.0 and gradients:
                factor = (limit / (norm + EPSILON)).clamp(max=1.0).float()
                torch._foreach_mul_(gradients, factor)


def _counted_gradients(part: MegatronOptimizer) -> list[Tensor]:
    """Gradients that count for the norm on this rank; megatron-core 0.19 renamed the method."""
    if hasattr(part, "get_grads_for_grad_norm"):
        return part.get_grads_for_grad_norm()
    return part.get_main_grads_for_grad_norm()
