"""An export whose layers lie on several devices, as accelerate's `device_map` places them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map
from transformers.cache_utils import DynamicLayer

from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from tests.inference.tiny import tiny_config

# Tensors without numbers refuse to be computed with one of another device. This one exists
# wherever torch does, and is another one than "cpu".
FIRST, SECOND = "cpu", "cpu:1"


def place(module: nn.Module, device: str) -> None:
    """Puts a module on a device, to which its inputs are brought, as accelerate's hooks do: tensors
    and what is made of lists, tuples and dicts of them, no objects."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device=device))

    def bring(_module: nn.Module, *inputs: Any) -> Any:
        return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, inputs)

    module.register_forward_pre_hook(bring, with_kwargs=True)


@pytest.mark.parametrize("split", ["decoder", "vision"])
@pytest.mark.parametrize("rows", ["zero", "attend_all"])
def test_layers_of_several_devices_attend_what_lies_on_the_first(split, rows, monkeypatch):
    """With padding and frames, of which the first tokens see none; then from the cache."""

    def begin(layer: DynamicLayer, keys: Tensor, values: Tensor) -> None:
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        layer.keys, layer.values = keys[:, :, :0], values[:, :, :0]

    monkeypatch.setattr(DynamicLayer, "lazy_initialization", begin)  # takes cpu:1 for cpu
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # there are no values
    with FakeTensorMode(), torch.no_grad():
        model = MossVideoForConditionalGeneration(tiny_config(tokens_before_first_frame=rows))
        inner = model.eval().model
        tower, decoder = inner.vision_model, inner.language_model
        place(tower, FIRST)
        second = [decoder.norm, model.lm_head, *decoder.layers[3:]]
        if split == "vision":
            local, late = tower.transformer.layers, tower.global_transformer
            parts = [*local[2:], tower.layernorm_post, tower.post_tile_positional_embedding]
            second += [*parts, *late.layers, inner.multi_modal_projector, *decoder.layers[:3]]
        for module in (inner.multi_modal_projector, decoder.embed_tokens, *decoder.layers[:3]):
            place(module, FIRST)
        for module in second:
            place(module, SECOND)
        ids = torch.ones(2, 12, dtype=torch.long)
        mask = torch.ones(2, 13, dtype=torch.long)
        out = model(
            input_ids=ids,
            pixel_values=torch.zeros(2, 3, 1, 3, 56, 56),
            attention_mask=mask[:, :12],
            labels=ids,
            num_items_in_batch=torch.tensor(3),
            use_cache=True,
        )
        assert str(out.logits.device) == str(out.loss.device) == SECOND
        cache = out.past_key_values
        devices = [str(layer.keys.device) for layer in cache.layers]
        assert devices[3:] == [SECOND] * 3
        assert devices[:3] == [FIRST if split == "decoder" else SECOND] * 3
        out = model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache)
        assert str(out.logits.device) == SECOND
