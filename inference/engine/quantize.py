"""Weight-only quantization of the decoder's linear layers: decoding reads a half or a quarter of
the bytes. Not quantized: the projections of frames, embeddings, norms and the vision tower.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inference.engine.cache import frame_projections
from inference.engine.quantized_linear import FORMATS, KINDS, QuantizedLinear
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from inference.kernels.choose import Kernels

# An output head in 4 bits moves logits more than all other layers (docs/engine.md).
HEAD = {"int4": "int8"}


def quantize_decoder(
    model: MossVideoForConditionalGeneration, kind: str, device: torch.device | None = None
) -> None:
    """Replaces the linear layers of the decoder and the output head, in place.

    Args:
        kind: one of `KINDS`.
        device: where the quantized layers are made and stay, one after the other, so that no more
            than one of them is there in full; None: where each is.

    Raises:
        ValueError: another `kind`.
    """
    if kind not in KINDS:
        raise ValueError(f"quantize={kind}: allowed: {', '.join(KINDS)}")
    decoder = model.model.language_model
    kept = {id(linear) for linear in frame_projections(decoder)}
    # A tensor-parallel head holds its linear layer.
    heads = {id(module) for module in model.lm_head.modules()}
    parents: list[nn.Module] = [model, *decoder.modules(), *model.lm_head.modules()]
    for parent in parents:
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and id(child) not in kept:
                own = HEAD.get(kind, kind) if id(child) in heads else kind
                setattr(parent, name, QuantizedLinear.of(child, own, device))


def use_kernels(model: nn.Module, kernels: Kernels) -> None:
    """Sets the kernels by which all quantized layers of a model compute."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.product = module.product_of(kernels)


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
        made = QuantizedLinear(numbers, scale, linear.in_features)
        setattr(model.get_submodule(parent), last, made)
