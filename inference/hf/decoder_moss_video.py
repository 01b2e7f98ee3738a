"""The decoder: self-attention layers with gated cross-attention layers between them.

Q = RoPE(q_norm(q)) at a token's position, K = k_norm(RoPE(k)) at the frame's. The published code
repeats K to all heads between rotation and norm; the norm works on each head alone with one weight,
so keys and values stay at the number of KV heads here, with the same numbers.

A layer does not hold what it attends: a `TokenCache` and a `FrameCache` keep keys and values and
compute attention over them (transformers' cache in attended_moss_video.py, the engine's static
buffers in inference/engine/cache.py). The number of heads follows from the weights, which may be a
tensor-parallel slice. A copy of this file is in every exported folder.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_moss_video import MossVideoConfig

Rotation = tuple[Tensor, Tensor]  # cosines and sines [B, S, head_dim]
FOLD = 8  # queries of a KV head's group up to which they are attended as if they were tokens
PIECE = 128  # keys of one piece, where a product over keys is cut into pieces
READ_ONLY_ROWS = 8  # of the embedding, as in Mllama: tokens that are never said, as <|image|>


class TokenCache(Protocol):
    """Keys and values of tokens."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keeps the new tokens' `k`, `v` `[B, KV heads, S, D]`; what `q` `[B, heads, S, D]` sees
        of all tokens so far, like `q`."""


class FrameCache(Protocol):
    """Keys and values of frames.

    sees: 1 where a token sees a frame, like the hidden states' dtype `[B, S, 1]`; None: all do.
    """

    sees: Tensor | None

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """What `q` `[B, heads, S, D]` sees, like `q`."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """Softmax attention over fewer KV heads than query heads, without repeating them.

    Args:
        q: `[B, heads, S, D]`.
        k, v: `[B, KV heads, L, D]`.
        mask: True where a query may see a key, one at least `[B or 1, 1, S, L]`; None: everywhere.
        causal: each query sees the keys up to its own index (S = L, no mask).
    """
    batch, heads, length, _ = q.shape
    groups = heads // k.shape[1]
    if groups == 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    if length * groups <= FOLD and not causal:
        return attend_few(q, k, v, mask)
    # KV heads join the batch, so that a group's heads are a dimension of stride 0.
    q = q.unflatten(1, (-1, groups)).flatten(0, 1)  # [B x KV heads, groups, S, D]
    k, v = (x.flatten(0, 1)[:, None].expand(-1, groups, -1, -1) for x in (k, v))
    if mask is not None and mask.shape[0] > 1:
        mask = mask.repeat_interleave(len(q) // batch, dim=0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return out.unflatten(0, (batch, -1)).flatten(1, 2)


def attend_few(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Computes `attend` for few queries over many keys, in plain products.

    A group's queries share their keys, which are read once for all of them. A fused CUDA kernel
    gives one block of threads to a KV head and a tile of queries, a handful of blocks for a whole
    GPU. On a CPU products take 0.8 (fp32) and 0.55 (bf16) of the fused kernel's time for 16 queries
    of 4 KV heads over 25,856 keys.
    """
    groups, length = q.shape[1] // k.shape[1], q.shape[2]
    folded = q.unflatten(1, (-1, groups)).flatten(2, 3)  # [B, KV heads, groups x S, D]
    scores = (k @ folded.mT).mT.float() * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask.repeat(1, 1, groups, 1), -torch.inf)
    weights = scores.softmax(-1).to(v.dtype)
    out = sum_in_pieces(weights, v) if v.device.type != "cpu" else weights @ v
    return out.unflatten(2, (groups, length)).flatten(1, 2)


def sum_in_pieces(weights: Tensor, v: Tensor) -> Tensor:
    """`weights @ v`, piece by piece of the keys, all pieces at once.

    cuBLAS gives a product of few rows to a block of threads for each matrix, and does not divide
    the keys: of a decoding step on an H200 with 25,957 keys these products took 6.8 of 15.9 ms.

    Args:
        weights: `[B, KV heads, n, L]`.
        v: `[B, KV heads, L, D]`. What is left of L after whole pieces of `PIECE` is one more.

    Returns:
        `[B, KV heads, n, D]`, summed in fp32.
    """
    whole = v.shape[2] // PIECE * PIECE
    parts = weights[..., :whole].unflatten(-1, (-1, PIECE)).transpose(2, 3)  # [B, KV, pieces, n, .]
    sums = (parts @ v[:, :, :whole].unflatten(2, (-1, PIECE))).sum(2, dtype=torch.float32)
    if whole < v.shape[2]:
        sums = sums + (weights[..., whole:] @ v[:, :, whole:]).float()
    return sums.to(v.dtype)


def inverse_frequencies(text: Any) -> Tensor:
    """Rotations per position in radians, fp32 `[head_dim / 2]`.

    Long wavelengths are slowed by `factor`, short ones kept, those between interpolated (the
    llama3 rule of Llama 3.1; transformers' modeling_rope_utils computes the same).
    """
    head_dim = text.hidden_size // text.num_attention_heads
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    theta = rope.get("rope_theta") or text.rope_theta
    inverse = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.get("rope_type", "default") == "default":
        return inverse
    if rope["rope_type"] != "llama3":
        raise ValueError(f"config.json: rope_type {rope['rope_type']!r}, allowed: llama3, default")
    ratio = rope["original_max_position_embeddings"] * inverse / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((ratio - low) / (high - low)).clamp(0.0, 1.0)  # 0: long wavelength, 1: short
    return (1 - smooth) * inverse / rope["factor"] + smooth * inverse


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotates `[B, heads, S, D]`: halves of a head are the pairs, as in Llama."""
    cos, sin = (r[:, None] for r in rotation)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class RMSNorm(nn.Module):
    """Root-mean-square norm in fp32 over the last dimension."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """The projections that self- and cross-attention share."""

    def __init__(self, config: MossVideoConfig, layer: int):
        super().__init__()
        text, self.layer = config.text_config, layer
        self.head_dim = text.hidden_size // text.num_attention_heads
        kv = self.head_dim * text.num_key_value_heads
        self.q_proj = nn.Linear(text.hidden_size, text.hidden_size, bias=False)
        self.k_proj = nn.Linear(text.hidden_size, kv, bias=False)
        self.v_proj = nn.Linear(text.hidden_size, kv, bias=False)
        self.o_proj = nn.Linear(text.hidden_size, text.hidden_size, bias=False)

    def _heads(self, x: Tensor) -> Tensor:
        """`[B, S, heads x D]` -> `[B, heads, S, D]`."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _out(self, x: Tensor) -> Tensor:
        return self.o_proj(x.transpose(1, 2).flatten(2))


class SelfAttention(Attention):
    def forward(self, x: Tensor, rotation: Rotation, token_cache: TokenCache) -> Tensor:
        q = rotate(self._heads(self.q_proj(x)), rotation)
        k = rotate(self._heads(self.k_proj(x)), rotation)
        return self._out(token_cache.attend(self.layer, q, k, self._heads(self.v_proj(x))))


class CrossAttention(Attention):
    def __init__(self, config: MossVideoConfig, layer: int):
        super().__init__(config, layer)
        eps = config.text_config.rms_norm_eps
        self.q_norm = RMSNorm(self.head_dim, eps)
        self.k_norm = RMSNorm(self.head_dim, eps)
        self.rope = config.cross_attention_rope

    def project(self, states: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Keys and values of vision states `[B, L, H]`: `[B, KV heads, L, D]` each.

        `rotation` rotates each state by its frame's position `[B, L, D]`.
        """
        return self.rotate_keys(self.k_proj(states), rotation), self._heads(self.v_proj(states))

    def rotate_keys(self, keys: Tensor, rotation: Rotation) -> Tensor:
        """Projected keys `[B, L, KV heads x D]` -> rotated, then normed `[B, KV heads, L, D]`."""
        k = self._heads(keys)
        return self.k_norm(rotate(k, rotation) if self.rope else k)

    def forward(self, x: Tensor, rotation: Rotation, frame_cache: FrameCache) -> Tensor:
        q = self.q_norm(self._heads(self.q_proj(x)))
        return self._out(frame_cache.attend(self.layer, rotate(q, rotation) if self.rope else q))


class SelfLayer(GradientCheckpointingLayer):
    """A layer as Llama's: self-attention and MLP."""

    def __init__(self, config: MossVideoConfig, layer: int):
        super().__init__()
        text = config.text_config
        self.input_layernorm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.self_attn = SelfAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.mlp = MLP(text.hidden_size, text.intermediate_size)

    def forward(self, x: Tensor, rotation: Rotation, token_cache: TokenCache) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, token_cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class CrossLayer(GradientCheckpointingLayer):
    """x += tanh(gate) * attention to frames; x += tanh(gate) * MLP, 0 for tokens without frame."""

    def __init__(self, config: MossVideoConfig, layer: int):
        super().__init__()
        text = config.text_config
        self.input_layernorm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.cross_attn = CrossAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.mlp = MLP(text.hidden_size, text.intermediate_size)
        self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
        self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self, x: Tensor, rotation: Rotation, frame_cache: FrameCache | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The next hidden states; without frames, of vision states what `project` gives."""
        if frame_cache is None:
            return self.cross_attn.project(x, rotation)
        attended = self.cross_attn(self.input_layernorm(x), rotation, frame_cache)
        x = x + self.cross_attn_attn_gate.tanh() * attended
        branch = self.mlp(self.post_attention_layernorm(x))
        if frame_cache.sees is not None:
            branch = branch * frame_cache.sees.to(branch.device)
        return x + self.cross_attn_mlp_gate.tanh() * branch


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: MossVideoConfig):
        super().__init__()
        self.config = config
        text = config.text_config
        self.embed_tokens = nn.Embedding(text.vocab_size + READ_ONLY_ROWS, text.hidden_size)
        self.cross = tuple(sorted(text.cross_attention_layers))
        self.layers = nn.ModuleList(
            (CrossLayer if i in self.cross else SelfLayer)(config, i)
            for i in range(text.num_hidden_layers)
        )
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self._inverse: Tensor | None = None

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """Cosines and sines of positions `[B, S]`; angles are computed in fp32."""
        if self._inverse is None or self._inverse.device != positions.device:
            self._inverse = inverse_frequencies(self.config.text_config).to(positions.device)
        angles = positions[..., None].float() * self._inverse
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def cross_attention(self, layer: int) -> CrossAttention:
        """The attention module of cross-attention layer number `layer`."""
        attention = self.layers[layer].cross_attn
        assert isinstance(attention, CrossAttention)
        return attention

    def project(self, layer: int, states: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """`CrossAttention.project` of a layer, by a call of the layer: what wraps it, as FSDP does,
        has its weights there only then."""
        keys_values: tuple[Tensor, Tensor] = self.layers[layer](states, rotation, None)
        return keys_values

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        token_cache: TokenCache,
        frame_cache: FrameCache | None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """Embedded tokens `[B, S, H]` at `positions` `[B, S]` -> normed hidden states.

        Without `frame_cache` the cross-attention layers are passed by. The input of each layer that
        runs is added to `states`, and then what is returned.
        """
        rotation = self.rotation(positions, x.dtype)
        for number, layer in enumerate(self.layers):  # by number: others wrap layers in theirs
            cache = frame_cache if number in self.cross else token_cache
            if cache is None:
                continue
            if states is not None:
                states.append(x)
            x = layer(x, rotation, cache)
        x = self.norm(x)
        if states is not None:
            states.append(x)
        return x
