"""Weight-only quantization of an export, in compressed-tensors' form, which transformers loads.

A linear layer's weight `[out, in]` becomes 8-bit numbers and a scale for each output: weight =
number x scale, scale = largest |weight| of the row / largest 8-bit number.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

LINEAR = re.compile(r"language_model\.model\.layers\..*(_proj)\.weight")
KINDS = {  # of --quantize: 8-bit type, its largest number, the form's name, the type's in configs
    "int8": (torch.int8, 127.0, "int-quantized", "int"),
    "fp8": (torch.float8_e4m3fn, 448.0, "float-quantized", "float"),
}
Parts = dict[str, tuple[torch.Size, torch.dtype]]


class Quantizer:
    """Quantizes the decoder's linear layers; embedding, head and vision stay as they are."""

    def __init__(self, kind: str):
        self.dtype, self.limit, self.form, self.type = KINDS[kind]

    def plan(self, parts: Parts) -> Parts:
        """Names, shapes and dtypes that `quantize` returns for tensors of these."""
        out: Parts = {}
        for name, (shape, dtype) in parts.items():
            if LINEAR.fullmatch(name):
                out[name] = (shape, self.dtype)
                out[f"{name}_scale"] = (torch.Size([shape[0], 1]), dtype)
            else:
                out[name] = (shape, dtype)
        return out

    def quantize(self, tensors: dict[str, Tensor], parts: Parts) -> dict[str, Tensor]:
        """The tensors, quantized where `parts`, made by `plan`, say so; fp32 is rounded once."""
        out: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if not LINEAR.fullmatch(name):
                out[name] = tensor
                continue
            # The scale that is stored, not a more exact one, is what numbers are divided by.
            dtype = parts[f"{name}_scale"][1]
            scale = (tensor.abs().amax(1, keepdim=True).float() / self.limit).to(dtype)
            scale = scale.clamp(min=torch.finfo(dtype).tiny)
            numbers = (tensor.float() / scale.float()).clamp(-self.limit, self.limit)
            whole = numbers.round() if self.dtype is torch.int8 else numbers
            out[name], out[f"{name}_scale"] = whole.to(self.dtype), scale
        return out

    def config(self) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        weights = {
            "num_bits": 8,
            "type": self.type,
            "symmetric": True,
            "strategy": "channel",
            "dynamic": False,
        }
        group = {"targets": ["Linear"], "weights": weights, "format": self.form}
        return {
            "quant_method": "compressed-tensors",
            "format": self.form,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head", "re:.*vision_model.*", "re:.*multi_modal_projector.*"],
        }
