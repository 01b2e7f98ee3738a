"""The decoder's pass over a few new tokens of some slots, in shapes that never change.

It computes what `inference.hf.decoder_moss_video.Decoder` does, with the same weights: written as
one loop over tensors, for kernels that do several operations at once. A residual branch is added
where the next norm reads the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from inference.engine.cache import KVCache
from inference.engine.cache_sizes import CacheSizes
from inference.engine.quantized_linear import QuantizedLinear
from inference.hf.decoder_moss_video import CrossLayer, Decoder, RMSNorm, SelfLayer
from inference.kernels.choose import Kernels
from inference.kernels.rows import Rows
from inference.kernels.trials import Sizes


@dataclass(frozen=True)
class _Layer:
    """A layer's weights as the pass reads them.

    project: queries, keys and values of a self-attention layer; queries of a cross-attention one.
    gates: the number of its first gate among all gates; None: a self-attention layer.
    """

    index: int
    first_norm: RMSNorm
    project: nn.Module
    out: nn.Module
    second_norm: RMSNorm
    gate_up: nn.Module
    down: nn.Module
    q_norm: RMSNorm | None = None
    gates: int | None = None


class FixedDecoder:
    """Hidden states of new tokens, whose keys and values are written to the cache.

    The projections that read the same input become one product: their weights are views of one
    tensor from then on.
    """

    def __init__(self, decoder: Decoder, cache: KVCache, kernels: Kernels):
        self.decoder, self.cache, self.kernels = decoder, cache, kernels
        gates: list[Tensor] = []
        self.layers: list[_Layer] = []
        for layer in decoder.layers:
            if isinstance(layer, CrossLayer):
                self.layers.append(_cross(layer, len(gates)))
                gates += [layer.cross_attn_attn_gate, layer.cross_attn_mlp_gate]
            else:
                self.layers.append(_own(cast(SelfLayer, layer)))
        self.gates = torch.cat(gates).detach().tanh()

    def __call__(self, tokens: Tensor, rows: Rows) -> Tensor:
        """Tokens `[B, S]` of `rows` -> normed hidden states `[B, S, H]`."""
        do = self.kernels
        x = self.decoder.embed_tokens(tokens).flatten(0, 1)  # [N, H]
        rotation = self.decoder.rotation(rows.positions.flatten()[None], x.dtype)
        cos, sin = (r[0] for r in rotation)  # [N, D]
        attention = do.attention(self.cache, rows)
        # What a cross-attention layer adds is 0 for a token that sees no frame.
        gates = self.gates[:, None] * attention.sees.flatten().to(x.dtype)
        branch = scale = None
        for layer in self.layers:
            cross = layer.gates is not None
            y = do.add_norm(x, branch, scale, layer.first_norm.weight, layer.first_norm.eps)
            scale = gates[layer.gates] if layer.gates is not None else None
            y = layer.project(y)
            if layer.q_norm is not None:
                turn = (cos, sin) if self.decoder.config.cross_attention_rope else None
                q = do.norm_and_rotate(y, layer.q_norm.weight, layer.q_norm.eps, turn)
                attended = attention.frames(layer.index, q)
            else:
                keys, values = self.cache.tokens_of[layer.index]
                scales = self.cache.scales_of.get(layer.index)
                q = do.rotate_and_keep(y, (cos, sin), keys, values, rows, scales)
                attended = attention.tokens(layer.index, q)
            norm = layer.second_norm
            y = do.add_norm(x, layer.out(attended), scale, norm.weight, norm.eps)
            branch = layer.down(do.swiglu(layer.gate_up(y)))
            scale = gates[layer.gates + 1] if cross else None  # type: ignore[operator]
        last = self.decoder.norm
        return do.add_norm(x, branch, scale, last.weight, last.eps).unflatten(0, tokens.shape)


def sizes_of(decoder: Decoder, cache: CacheSizes) -> Sizes:
    """What the kernels need to know of a decoder, or of a rank's slice of it."""
    text = decoder.config.text_config
    share = text.num_key_value_heads // cache.kv_heads  # ranks
    return Sizes(
        hidden=text.hidden_size,
        inner=text.intermediate_size // share,
        heads=text.num_attention_heads // share,
        kv_heads=cache.kv_heads,
        head_dim=cache.head_dim,
        patches=cache.patches,
        eight_bit=cache.item == 1,
        fp8_weights=any(_is_fp8(module) for module in decoder.modules()),
    )


def _is_fp8(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLinear) and module.weight.dtype.is_floating_point


def _own(layer: SelfLayer) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        attention.layer,
        layer.input_layernorm,
        join([attention.q_proj, attention.k_proj, attention.v_proj]),
        attention.o_proj,
        layer.post_attention_layernorm,
        join([mlp.gate_proj, mlp.up_proj]),
        mlp.down_proj,
    )


def _cross(layer: CrossLayer, gates: int) -> _Layer:
    attention, mlp = layer.cross_attn, layer.mlp
    return _Layer(
        attention.layer,
        layer.input_layernorm,
        attention.q_proj,
        attention.o_proj,
        layer.post_attention_layernorm,
        join([mlp.gate_proj, mlp.up_proj]),
        mlp.down_proj,
        attention.q_norm,
        gates,
    )


def join(linears: Sequence[Any]) -> nn.Module:
    """One layer whose output is that of `linears` side by side; theirs become views of its
    weights."""
    sizes = [len(linear.weight) for linear in linears]
    weight = torch.cat([linear.weight.detach() for linear in linears])
    parts = list(zip(linears, weight.split(sizes), strict=True))
    if isinstance(linears[0], QuantizedLinear):
        scale = torch.cat([linear.scale for linear in linears])
        for (linear, part), own in zip(parts, scale.split(sizes), strict=True):
            linear.weight, linear.scale = part, own
        return QuantizedLinear(weight, scale, linears[0].in_features, linears[0].product)
    for linear, part in parts:
        linear.weight = nn.Parameter(part, requires_grad=False)
    joined = nn.Linear(1, 1, bias=False, device="meta")
    joined.out_features, joined.in_features = weight.shape
    joined.weight = nn.Parameter(weight, requires_grad=False)
    return joined
