"""Gradients of gates, to be compared with tight bounds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def with_gates_together(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """These gradients by name, those of all gates as one tensor, `gates`.

    A gate's gradient is one sum over a layer's outputs, of terms of both signs: how much of it is
    rounding depends on the CPU (1e-5 where other parameters have 5e-6), and not on what is tested.
    """
    gates = {name: gradient for name, gradient in gradients.items() if gradient.shape == (1,)}
    others = {name: gradient for name, gradient in gradients.items() if name not in gates}
    return others | {"gates": torch.cat(list(gates.values()))}
