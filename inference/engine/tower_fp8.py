"""The vision tower's linear layers in FP8 (data_pipeline/fp8.py): norms and GELU write what the
products read, and weights are kept rounded. Attention and the residual stream stay as they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from data_pipeline.choose_fp8 import PRODUCT, fp8_of, right_parts
from data_pipeline.fp8 import MULTIPLE, Fp8, Rounded
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from inference.hf.vision_moss_video import VisionLayer


class Fp8Linear(nn.Module):
    """A linear layer whose weights are rounded once; it takes `[..., in]` rounded, too."""

    values: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, fp8: Fp8):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.fp8, self.bias = fp8, linear.bias
        rounded = fp8.round(linear.weight.detach())
        self.register_buffer("values", rounded.values)
        self.register_buffer("scale", rounded.scale)

    def forward(self, x: Tensor | Rounded) -> Tensor:
        x = x if isinstance(x, Rounded) else self.fp8.round(x)
        return self.fp8.product(x, Rounded(self.values, self.scale, x.dtype), self.bias, True)


class Fp8Norm(nn.Module):
    """A LayerNorm that writes `[..., in]` rounded."""

    def __init__(self, norm: nn.LayerNorm, fp8: Fp8):
        super().__init__()
        self.norm, self.fp8 = norm, fp8

    def forward(self, x: Tensor) -> Rounded:
        return self.fp8.norm(x, self.norm.weight, self.norm.bias, self.norm.eps)


class Fp8MLP(nn.Module):
    def __init__(self, fc1: Fp8Linear, fc2: Fp8Linear, fp8: Fp8):
        super().__init__()
        self.fc1, self.fc2, self.fp8 = fc1, fc2, fp8

    def forward(self, x: Rounded) -> Tensor:
        out: Tensor = self.fc2(self.fp8.gelu(self.fc1(x)))
        return out


def _check(model: MossVideoForConditionalGeneration) -> None:
    """Raises ValueError where a model's tower has no sizes for FP8."""
    vision = model.config.vision_config
    for name in ("hidden_size", "intermediate_size"):
        width = getattr(vision, name)
        if width % MULTIPLE:
            raise ValueError(
                f"vision_dtype=fp8: vision_config.{name}={width}: must be a multiple of {MULTIPLE}"
            )


@torch.inference_mode()
def round_tower(model: MossVideoForConditionalGeneration) -> None:
    """Has a model's vision tower compute in FP8 from now on. Where the device's products do not
    prove right, it stays as it is, and a line says so.

    Raises:
        ValueError: the tower has no sizes for it.
    """
    _check(model)
    vision, tower = model.config.vision_config, model.model.vision_model
    if any(isinstance(module, Fp8Linear) for module in tower.modules()):
        return
    weight = tower.class_embedding
    widths = [vision.hidden_size, vision.intermediate_size]
    right = right_parts(widths, weight.dtype, weight.device)
    if PRODUCT not in right:
        return
    fp8 = fp8_of(right)
    for layer in (*tower.transformer.layers, *tower.global_transformer.layers):
        assert isinstance(layer, VisionLayer)
        _round_layer(layer, fp8)


def _round_layer(layer: VisionLayer, fp8: Fp8) -> None:
    for name in ("input_layernorm", "post_attention_layernorm"):
        setattr(layer, name, Fp8Norm(getattr(layer, name), fp8))
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(layer.self_attn, name, Fp8Linear(getattr(layer.self_attn, name), fp8))
    first, second = (Fp8Linear(linear, fp8) for linear in (layer.mlp.fc1, layer.mlp.fc2))
    layer.mlp = Fp8MLP(first, second, fp8)  # type: ignore[assignment]
