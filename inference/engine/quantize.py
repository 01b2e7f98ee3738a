"""Weight-only quantization of the decoder's linear layers: decoding reads half the bytes.

Each row of a weight is stored in int8 or fp8 (e4m3) with one scale; products are computed in the
model's dtype. Not quantized: the projections of frames, embeddings, norms and the vision tower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inference.engine.cache import frame_projections
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from inference.kernels import plain

INT8_KERNEL_TOKENS = 8  # up to so many tokens, torch's int8 kernel beats a product in full weights


@dataclass(frozen=True)
class Format:
    """How a weight is stored; `largest`: the value that the largest weight of a row gets."""

    dtype: torch.dtype
    largest: float

    def store(self, scaled: Tensor) -> Tensor:
        """Values from -largest to largest, rounded to the nearest that the format has."""
        scaled = scaled.clamp(-self.largest, self.largest)
        # A conversion to a floating-point format rounds; one to integers cuts off.
        return (scaled if self.dtype.is_floating_point else scaled.round()).to(self.dtype)


FORMATS = {"int8": Format(torch.int8, 127.0), "fp8": Format(torch.float8_e4m3fn, 448.0)}


class QuantizedLinear(nn.Module):
    """`x @ (weight * scale).T`, without bias.

    weight: `[out, in]` in int8 or fp8. scale: `[out]` in the model's dtype.
    product: computes it (`use_product`).
    """

    weight: Tensor
    scale: Tensor

    def __init__(
        self, weight: Tensor, scale: Tensor, product: Callable[..., Tensor] = plain.product8
    ):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.product = product

    @classmethod
    def of(cls, linear: nn.Linear, kind: str) -> QuantizedLinear:
        """Quantizes a layer."""
        assert linear.bias is None
        stored = FORMATS[kind]
        full = linear.weight.detach().float()
        scale = (full.abs().amax(1).clamp(min=1e-12) / stored.largest).to(linear.weight.dtype)
        return cls(stored.store(full / scale.float()[:, None]), scale)

    def forward(self, x: Tensor) -> Tensor:
        if self._has_kernel(x):
            out = torch._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scale)
            return out.unflatten(0, x.shape[:-1])
        out = self.product(x.flatten(0, -2), self.weight, self.scale)
        return out.unflatten(0, x.shape[:-1])

    def _has_kernel(self, x: Tensor) -> bool:
        """int8 weights and a few tokens in bf16 on a CPU: there torch reads the weights in 8 bits,
        half of what a product in bf16 reads. The kernel's fp32 form is slow."""
        few = x.numel() // x.shape[-1] <= INT8_KERNEL_TOKENS
        dtypes = (self.weight.dtype, x.dtype) == (torch.int8, torch.bfloat16)
        return dtypes and few and x.device.type == "cpu"


def quantize_decoder(model: MossVideoForConditionalGeneration, kind: str) -> None:
    """Replaces the linear layers of the decoder and the output head, in place.

    Raises:
        ValueError: another `kind` than int8 and fp8.
    """
    if kind not in FORMATS:
        raise ValueError(f"quantize={kind}: allowed: {', '.join(FORMATS)}")
    decoder = model.model.language_model
    kept = {id(linear) for linear in frame_projections(decoder)}
    # A tensor-parallel head holds its linear layer.
    parents: list[nn.Module] = [model, *decoder.modules(), *model.lm_head.modules()]
    for parent in parents:
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and id(child) not in kept:
                setattr(parent, name, QuantizedLinear.of(child, kind))


def use_product(model: nn.Module, product: Callable[..., Tensor]) -> None:
    """How all quantized layers of a model compute: like `plain.product8`."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.product = product


def take_scales(
    model: MossVideoForConditionalGeneration, scales: dict[str, Tensor], kind: str
) -> None:
    """Makes quantized layers of a checkpoint that is quantized already: its numbers have been
    loaded as if they were weights (which any float holds exactly), its scales were not.

    scales: by name of the layer, `[out]`.
    """
    kept = {id(linear) for linear in frame_projections(model.model.language_model)}
    for name, scale in scales.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        scale = scale.to(linear.weight.dtype)
        if id(linear) in kept:
            linear.weight.data *= scale[:, None]
            continue
        parent, _, last = name.rpartition(".")
        numbers = linear.weight.detach().to(FORMATS[kind].dtype)
        setattr(model.get_submodule(parent), last, QuantizedLinear(numbers, scale))
