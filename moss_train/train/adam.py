"""AdamW in the shape that megatron's distributed optimizer keeps its state in.

megatron expects FusedAdam of Transformer Engine or Apex: `step` in the parameter group, `exp_avg`
and `exp_avg_sq` in the state. torch's AdamW keeps `step` for each parameter, so that loading a
distributed checkpoint fails with KeyError: 'step'; and where rank 0 holds no trainable parameter,
the saved group has no step at all. megatron has no public hook for another class: `install` sets
it into the two modules that look for one.
"""

from __future__ import annotations

from typing import Any

import torch


class FusedShapeAdam(torch.optim.Optimizer):
    """Decoupled-weight-decay Adam (Loshchilov & Hutter 2019), computed by torch's fused kernel.

    refused: 1 on the device where the step must change nothing, 0 where it may; the step counts
        all the same, until `take_back`.
    """

    refused: torch.Tensor | None = None

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ):
        if capturable or not adam_w_mode:
            raise ValueError("FusedShapeAdam is AdamW outside CUDA graphs, nothing else")
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates the parameters that have a gradient; counts the step of every group."""
        for group in self.param_groups:
            # An empty group counts too: another rank's parameters are at this step.
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None and p.numel()]
            if not params:
                continue
            states = [self._state(p) for p in params]
            step = torch.full((), float(group["step"]), device=params[0].device)
            # Not `torch.optim.adamw.adamw`, which counts up a step of its own for each parameter.
            torch._fused_adamw_(
                params,
                [p.grad for p in params],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [],
                [step] * len(params),
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                found_inf=self.refused,
            )

    def take_back(self) -> None:
        """The last step was refused: it does not count."""
        for group in self.param_groups:
            group["step"] -= 1

    def _state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def install() -> None:
    """Makes megatron use FusedShapeAdam, also where it would find another one.

    Those of Transformer Engine and Apex cannot be refused on the device.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    package: Any = optimizer
    module: Any = distrib_optimizer
    package.Adam = module.Adam = FusedShapeAdam
    package.USING_PYTORCH_OPTIMIZER = module.USING_TE_OPTIMIZER = False
    module.HAVE_APEX_OR_TE = module.USING_APEX_OPTIMIZER = True
