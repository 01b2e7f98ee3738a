"""Weight-only quantization of the decoder's linear layers, for decoding that waits for memory.

A weight's row is stored in int8 or fp8 (e4m3) with one scale; products are in the model's dtype.
Keys and values of frames, embeddings, norms and the vision tower stay as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration

KINDS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
FEW = 8  # rows up to which torch's int8 kernel beats a product with the weights turned back


class QuantizedLinear(nn.Module):
    """`x @ (weight * scale).T`, without bias.

    weight: `[out, in]` in int8 or fp8. scale: `[out]` in the model's dtype.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    @classmethod
    def of(cls, linear: nn.Linear, kind: str) -> QuantizedLinear:
        """Quantizes a layer."""
        assert linear.bias is None
        dtype, largest = KINDS[kind]
        full = linear.weight.detach().float()
        scale = (full.abs().amax(1).clamp(min=1e-12) / largest).to(linear.weight.dtype)
        scaled = (full / scale.float()[:, None]).clamp(-largest, largest)
        return cls((scaled.round() if kind == "int8" else scaled).to(dtype), scale)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        int8, cpu = self.weight.dtype is torch.int8, x.device.type == "cpu"
        # The fp32 form of this kernel is slow; in bf16 it reads half of what a product reads.
        if int8 and cpu and rows <= FEW and x.dtype is torch.bfloat16:
            out = torch._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scale)
            return out.unflatten(0, x.shape[:-1])
        # torch.compile makes one kernel of this on CUDA, which reads a byte a weight.
        return F.linear(x, self.weight.to(x.dtype)) * self.scale


def quantize_decoder(model: MossVideoForConditionalGeneration, kind: str) -> None:
    """Replaces the linear layers of the decoder and the output head, in place.

    Raises:
        ValueError: another `kind` than int8 and fp8.
    """
    if kind not in KINDS:
        raise ValueError(f"quantize={kind}: allowed: {', '.join(KINDS)}")
    decoder = model.model.language_model
    frames = _of_frames(model)
    # A tensor-parallel head holds its linear layer.
    parents: list[nn.Module] = [model, *decoder.modules(), *model.lm_head.modules()]
    for parent in parents:
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and id(child) not in frames:
                setattr(parent, name, QuantizedLinear.of(child, kind))


def take_scales(
    model: MossVideoForConditionalGeneration, scales: dict[str, Tensor], kind: str
) -> None:
    """Makes quantized layers of a checkpoint that is quantized already: its numbers have been
    loaded as if they were weights (which any float holds exactly), its scales were not.

    scales: by name of the layer, `[out]`.
    """
    frames = _of_frames(model)
    for name, scale in scales.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        scale = scale.to(linear.weight.dtype)
        if id(linear) in frames:
            linear.weight.data *= scale[:, None]
            continue
        parent, _, last = name.rpartition(".")
        numbers = linear.weight.detach().to(KINDS[kind][0])
        setattr(model.get_submodule(parent), last, QuantizedLinear(numbers, scale))


def _of_frames(model: MossVideoForConditionalGeneration) -> set[int]:
    """Layers that make keys and values of frames."""
    decoder = model.model.language_model
    return {
        id(linear)
        for layer in decoder.cross
        for attention in (decoder.cross_attention(layer),)
        for linear in (attention.k_proj, attention.v_proj)
    }
