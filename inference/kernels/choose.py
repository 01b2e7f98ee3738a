"""Which form of each operation a device uses: a Triton kernel that is right there, or torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from data_pipeline import devices
from data_pipeline.kernel_proof import Kernel, proven
from inference.kernels import plain
from inference.kernels.rows import Attention
from inference.kernels.trials import Sizes, Trials

KINDS = ("auto", "triton", "torch")


@dataclass(frozen=True)
class Kernels:
    """The operations of a decoding pass, each with the signature that it has in plain.py."""

    add_norm: Callable[..., Tensor] = plain.add_norm
    swiglu: Callable[[Tensor], Tensor] = plain.swiglu
    rotate_and_keep: Callable[..., Tensor] = plain.rotate_and_keep
    norm_and_rotate: Callable[..., Tensor] = plain.norm_and_rotate
    product8: Callable[..., Tensor] = plain.product8
    product4: Callable[..., Tensor] = plain.product4
    attention: type[Attention] = plain.Attention

    @property
    def any_rows(self) -> bool:
        """Attention reads the slots of its rows where they are; plain torch would copy them."""
        return self.attention.any_rows


def choose(
    kind: str,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sizes,
    attention: type[Attention] = plain.Attention,
) -> Kernels:
    """The operations for a device.

    Args:
        kind: `auto`: where Triton works, its kernels that prove right, else plain torch; `triton`:
            its kernels, unproven; `torch`: plain torch.
        attention: that operation, where it is not Triton's.

    Raises:
        ValueError: `triton` where it cannot run.
    """
    if kind not in KINDS:
        raise ValueError(f"kernels={kind}: allowed: {', '.join(KINDS)}")
    others = Kernels(attention=attention)
    if kind == "torch" or (kind == "auto" and not devices.has_triton(device)):
        return others
    try:
        fused = _triton()
    except ImportError as error:
        if kind == "triton":
            raise ValueError(f"kernels=triton: {error}: install triton") from None
        return others
    if kind == "triton":
        return fused
    return proven_ones(fused, device, dtype, sizes)


def _triton() -> Kernels:
    from inference.kernels import triton_attention, triton_products, triton_rows

    return Kernels(
        triton_rows.add_norm,
        triton_rows.swiglu,
        triton_rows.rotate_and_keep,
        triton_rows.norm_and_rotate,
        triton_products.product8,
        triton_products.product4,
        triton_attention.Attention,
    )


def proven_ones(fused: Kernels, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Kernels:
    """For each operation the kernel of `fused` where it computes what plain torch does, else plain
    torch."""
    trials, chosen = Trials(device, dtype, sizes), Kernels()
    for name in Kernels.__dataclass_fields__:
        ours, others = getattr(fused, name), getattr(chosen, name)
        modules = (ours.__module__, plain.__name__, Trials.__module__)
        cases = partial(getattr(trials, name), ours, others)
        shapes = f"{dtype}, {sizes}"
        if proven(
            Kernel(f"the kernel {name}", shapes, ("torch", "triton"), modules, cases), device
        ):
            chosen = replace(chosen, **{name: ours})
    return chosen
