"""Vision tower, pooling and projector: frames -> the states that the decoder attends.

`N` frames of `T` tiles, `P` patches of a tile with the class token first, `D` wide. A copy of this
file is in every exported folder; names of parameters are those of transformers' Mllama.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_moss_video import MossVideoConfig

PATCH_MULTIPLE = 8  # patches of a tile are padded with zeros to a multiple of this


class TileEmbedding(nn.Module):
    """Adds tanh(gate) x an embedding of (aspect ratio, tile)."""

    def __init__(self, config: MossVideoConfig):
        super().__init__()
        vision = config.vision_config
        self.shape = (vision.max_num_tiles, 1, vision.hidden_size)
        rows = len(vision.supported_aspect_ratios) + 1
        self.embedding = nn.Embedding(rows, math.prod(self.shape))
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, ratio_ids: Tensor) -> Tensor:  # [N, T, P, D], [N]
        tiles = self.embedding(ratio_ids).view(-1, *self.shape)[:, : x.shape[1]]
        return x + self.gate.tanh() * tiles


class PositionEmbedding(nn.Module):
    """Adds the gated sum of a patch embedding and an (aspect ratio, tile, patch) embedding."""

    def __init__(self, config: MossVideoConfig):
        super().__init__()
        vision = config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2 + 1
        self.shape = (vision.max_num_tiles, patches, vision.hidden_size)
        self.gate = nn.Parameter(torch.zeros(1))
        self.embedding = nn.Parameter(torch.zeros(self.shape[1:]))
        rows = len(vision.supported_aspect_ratios) + 1
        self.tile_embedding = nn.Embedding(rows, math.prod(self.shape))

    def forward(self, x: Tensor, ratio_ids: Tensor) -> Tensor:  # [N, T, P, D], [N]
        gate = self.gate.tanh()
        tiles = self.tile_embedding(ratio_ids).view(-1, *self.shape)[:, : x.shape[1]]
        return x + (1 - gate) * self.embedding + gate * tiles


def attend_patches(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention `[N, L, heads, D]`; `mask` `[N, 1, L, L]` is True where a patch sees
    another."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


class VisionAttention(nn.Module):
    """Self-attention over all patches of all tiles of a frame, computed by `attend`."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.head_dim = width // heads
        self.attend: Callable[..., Tensor] = attend_patches
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # [N, L, D], [N, 1, L, L]
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(self.attend(q, k, v, mask).flatten(2))


class VisionMLP(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class VisionLayer(GradientCheckpointingLayer):
    """Pre-norm layer; those of the global transformer gate both branches."""

    def __init__(self, config: MossVideoConfig, gated: bool):
        super().__init__()
        vision = config.vision_config
        width = vision.hidden_size
        self.input_layernorm = nn.LayerNorm(width, eps=vision.norm_eps)
        self.self_attn = VisionAttention(width, vision.attention_heads)
        self.post_attention_layernorm = nn.LayerNorm(width, eps=vision.norm_eps)
        self.mlp = VisionMLP(width, vision.intermediate_size)
        self.gate_attn = nn.Parameter(torch.full((1,), math.pi / 4)) if gated else None
        self.gate_ffn = nn.Parameter(torch.full((1,), math.pi / 4)) if gated else None

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        branch = self.self_attn(self.input_layernorm(x), mask)
        x = x + (branch if self.gate_attn is None else self.gate_attn.tanh() * branch)
        branch = self.mlp(self.post_attention_layernorm(x))
        return x + (branch if self.gate_ffn is None else self.gate_ffn.tanh() * branch)


class Transformer(nn.Module):
    """Holds `layers` under the name that checkpoints have."""

    def __init__(self, config: MossVideoConfig, count: int, gated: bool):
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config, gated) for _ in range(count))


class VisionTower(nn.Module):
    """Encodes tiles to the final hidden state and the intermediate ones."""

    def __init__(self, config: MossVideoConfig):
        super().__init__()
        self.config = config
        vision = config.vision_config
        width, patch = vision.hidden_size, vision.patch_size
        self.intermediate = tuple(vision.intermediate_layers_indices)
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.gated_positional_embedding = PositionEmbedding(config)
        self.pre_tile_positional_embedding = TileEmbedding(config)
        self.post_tile_positional_embedding = TileEmbedding(config)
        self.layernorm_pre = nn.LayerNorm(width)
        self.layernorm_post = nn.LayerNorm(width)
        self.transformer = Transformer(config, vision.num_hidden_layers, gated=False)
        self.global_transformer = Transformer(config, vision.num_global_layers, gated=True)

    def forward(self, pixels: Tensor, ratio_ids: Tensor, tiles: Tensor) -> list[Tensor]:
        """Encodes frames.

        Args:
            pixels: normalized `[N, T, 3, h, w]`.
            ratio_ids: aspect-ratio id of each frame `[N]`.
            tiles: True for real tiles `[N, T]`; of no concern with `full_attention`.

        Returns:
            The final state and the states that enter each of `intermediate_layers_indices`, in
            their order, each `[N, T, P, D]`.
        """
        x = self._embed(pixels, ratio_ids)  # [N, T, P, D]
        count, patches = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -patches % PATCH_MULTIPLE))
        padded = x.shape[2]
        mask = None if self.config.full_attention else _padding_mask(tiles, patches, padded)

        x = x.flatten(1, 2)  # [N, T x padded P, D]
        entering = {}
        for index, layer in enumerate(self.transformer.layers):
            if index in self.intermediate:
                entering[index] = x
            x = layer(x, mask)
        x = self.layernorm_post(x).unflatten(1, (count, padded))
        x = self.post_tile_positional_embedding(x, ratio_ids).flatten(1, 2)
        for layer in self.global_transformer.layers:
            x = layer(x, mask)
        states = (x, *(entering[index] for index in self.intermediate))
        # Layers may be on several devices.
        return [s.to(x.device).unflatten(1, (count, padded))[:, :, :patches] for s in states]

    def _embed(self, pixels: Tensor, ratio_ids: Tensor) -> Tensor:
        frames, tiles = pixels.shape[:2]
        x = self.patch_embedding(pixels.flatten(0, 1).to(self.patch_embedding.weight.dtype))
        x = x.flatten(2).transpose(1, 2).unflatten(0, (frames, tiles))  # [N, T, grid^2, D]
        x = self.pre_tile_positional_embedding(x, ratio_ids)
        x = torch.cat((self.class_embedding.expand(frames, tiles, 1, -1), x), dim=2)
        return self.layernorm_pre(self.gated_positional_embedding(x, ratio_ids))


def _padding_mask(tiles: Tensor, patches: int, padded: int) -> Tensor:
    """Llama-3.2-Vision's mask `[N, 1, L, L]`: only a padding query may not see a padding key."""
    patch = torch.arange(padded, device=tiles.device) < patches
    padding = ~(tiles[:, :, None] & patch).flatten(1)  # [N, L]
    return ~(padding[:, None, :, None] & padding[:, None, None, :])


def pool_grid(x: Tensor, mode: str, stride: int, merger: nn.Module | None = None) -> Tensor:
    """Pools the patches of each tile: `[N, T, 1 + g x g, D]` -> `[N, T, 1 + (g / stride)^2, D]`."""
    frames, tiles, patches, _ = x.shape
    grid = math.isqrt(patches - 1)
    image = x[:, :, 1:].flatten(0, 1).transpose(1, 2).unflatten(2, (grid, grid))  # [N T, D, g, g]
    if merger is not None:
        image = merger(image)
    elif mode == "average":
        image = F.avg_pool2d(image, stride)
    elif mode == "max":
        image = F.max_pool2d(image, stride)
    else:
        size = (grid // stride, grid // stride)
        image = F.interpolate(image.float(), size=size, mode="bilinear").to(image.dtype)
    image = image.flatten(2).transpose(1, 2).unflatten(0, (frames, tiles))
    return torch.cat((x[:, :, :1], image), dim=2)


def join_states(
    states: list[Tensor], mode: str, stride: int, merger: nn.Module | None = None
) -> Tensor:
    """Pooled states side by side `[N, T, P, D x len(states)]`: final, then intermediates
    channel-major.

    Pooling that works on each channel alone is done before they are joined: the same numbers with
    stride^2 less memory. `channel_fusion` mixes channels, so it comes after.
    """
    alone = mode not in ("none", "channel_fusion")
    final, *rest = [pool_grid(s, mode, stride) for s in states] if alone else states
    joined = torch.cat((final, torch.stack(rest, -1).flatten(-2)), -1) if rest else final
    return pool_grid(joined, mode, stride, merger) if merger is not None else joined
