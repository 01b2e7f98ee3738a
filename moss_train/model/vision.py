"""Vision tower of Llama-3.2-Vision: patches of tiles -> hidden states of a local, then a global
transformer. Which rank encodes which frames is decided in parallel/exchange.py.
"""

from __future__ import annotations

import math

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils import skip_init

from data_pipeline.aspect_ratios import supported_aspect_ratios
from data_pipeline.attention_kinds import KINDS, TOWER
from moss_train import hardware
from moss_train.model.mlp import FeedForward
from moss_train.model.norms import LayerNorm
from moss_train.model.self_attention import SelfAttention
from moss_train.model_config import ModelConfig, VisionConfig
from moss_train.transfer import constant

PATCH_MULTIPLE = 8  # the patches of a tile are padded with zeros to a multiple of this
MANY_PADS = 0.1  # of a tile's patches: from here on a tile's padding is computed as one row


def rows_of_tile(vision: VisionConfig, backend: str) -> tuple[int, int]:
    """Rows that a tile is computed in, and how many rows its last one stands for.

    The zeros that pad a tile take part in the published model's attention. All of a tile's are
    equal in every layer, since nothing tells them apart: one row computes them all, if its key
    weighs as much as theirs, with the logarithm of their count added to its scores. That saves a
    quarter of a tower with 17 patches, nothing worth a mask in one with 1,601; fused kernels
    without a mask (flash, te) take them as they are.
    """
    patches = vision.num_patches
    pads = -patches % PATCH_MULTIPLE
    kind = KINDS.get(backend, KINDS["sdpa"])
    maskless = TOWER in kind.training and not kind.mask
    if pads < max(2, MANY_PADS * patches) or maskless:
        return patches + pads, 1
    return patches + 1, pads


def tiles_used(ratio_ids: Tensor, vision: VisionConfig) -> Tensor:
    """Real tiles of each frame `[N]`, from its aspect-ratio id."""
    counts = (0, *(high * wide for high, wide in supported_aspect_ratios(vision.max_tiles)))
    return constant(counts, torch.int64, ratio_ids.device)[ratio_ids]


class TileEmbedding(nn.Module):
    """Adds tanh(gate) x an embedding of (aspect ratio, tile) to `[N, T, P, D]`."""

    def __init__(self, vision: VisionConfig, dtype: torch.dtype):
        super().__init__()
        self.shape = (vision.max_tiles, 1, vision.hidden_size)
        rows, width = vision.num_aspect_ratios + 1, vision.max_tiles * vision.hidden_size
        self.embedding = nn.Embedding(rows, width, _weight=torch.empty(rows, width, dtype=dtype))
        self.gate = nn.Parameter(torch.empty(1, dtype=dtype))

    def forward(self, x: Tensor, ratio_ids: Tensor) -> Tensor:
        tiles = self.embedding(ratio_ids).view(-1, *self.shape)[:, : x.shape[1]]
        return x + self.gate.tanh() * tiles


class PositionEmbedding(nn.Module):
    """Adds the gated sum of a patch embedding and a (aspect ratio, tile, patch) embedding."""

    def __init__(self, vision: VisionConfig, dtype: torch.dtype):
        super().__init__()
        self.shape = (vision.max_tiles, vision.num_patches, vision.hidden_size)
        rows = vision.num_aspect_ratios + 1
        width = vision.max_tiles * vision.num_patches * vision.hidden_size
        self.gate = nn.Parameter(torch.empty(1, dtype=dtype))
        self.embedding = nn.Parameter(torch.empty(self.shape[1:], dtype=dtype))
        self.tile_embedding = nn.Embedding(
            rows, width, _weight=torch.empty(rows, width, dtype=dtype)
        )

    def forward(self, x: Tensor, ratio_ids: Tensor) -> Tensor:
        gate = self.gate.tanh()
        tiles = self.tile_embedding(ratio_ids).view(-1, *self.shape)[:, : x.shape[1]]
        return x + (1 - gate) * self.embedding + gate * tiles


class VisionLayer(MegatronModule):
    """Pre-norm transformer layer of megatron's parts; global layers gate both branches."""

    def __init__(
        self,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        backend: str,
        gated: bool,
        number: int,
    ):
        super().__init__(config)
        self.tp_group = groups.tp
        dtype = config.params_dtype
        self.input_norm = LayerNorm(config)
        self.attention = SelfAttention(config, groups, backend, number, text=False)
        self.mlp_norm = LayerNorm(config)
        self.mlp = FeedForward(config, groups)
        self.gate_attn = nn.Parameter(torch.empty(1, dtype=dtype)) if gated else None
        self.gate_ffn = nn.Parameter(torch.empty(1, dtype=dtype)) if gated else None

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`x`: `[N, L, D]`; `mask`: None or what is added to scores, like `[N, heads, L, L]`."""
        branch = self.attention(self.input_norm(x, self.attention.linear_qkv.rounds), mask)
        x = x + (branch if self.gate_attn is None else self.gate_attn.tanh() * branch)
        branch = self.mlp(self.mlp_norm(x, self.mlp.linear_fc1.rounds))
        return x + (branch if self.gate_ffn is None else self.gate_ffn.tanh() * branch)


class VisionTower(MegatronModule):
    """Frames -> the final hidden state and the intermediate ones."""

    def __init__(
        self, model: ModelConfig, config: TransformerConfig, groups: ProcessGroupCollection
    ):
        super().__init__(config)
        self.tp_group = groups.tp
        self.vision = vision = model.vision
        self.rows, self.copies = rows_of_tile(vision, model.attention)
        width, patch, dtype = vision.hidden_size, vision.patch_size, config.params_dtype
        made = {"dtype": dtype, "device": hardware.device()}
        self.patch_embedding = skip_init(
            nn.Conv2d, 3, width, patch, stride=patch, bias=False, **made
        )
        self.class_embedding = nn.Parameter(torch.empty(width, dtype=dtype))
        self.pre_tile = TileEmbedding(vision, dtype)
        self.position = PositionEmbedding(vision, dtype)
        self.norm_pre = nn.LayerNorm(width, dtype=dtype)
        self.norm_post = nn.LayerNorm(width, dtype=dtype)
        self.post_tile = TileEmbedding(vision, dtype)

        def layers(count: int, gated: bool) -> nn.ModuleList:
            return nn.ModuleList(
                VisionLayer(config, groups, model.attention, gated, number + 1)
                for number in range(count)
            )

        self.local_layers = layers(vision.num_layers, gated=False)
        self.global_layers = layers(vision.num_global_layers, gated=True)

    def forward(self, pixels: Tensor, ratio_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encodes frames.

        Args:
            pixels: normalized frames `[N, T, 3, h, w]`.
            ratio_ids: aspect-ratio id of each frame `[N]`.

        Returns:
            The final state `[N, T, P, D]` and the states that enter the layers of
            `intermediate_layers`, in their order, each `[N, T, P, D]`; P counts the class token
            first.
        """
        tiles = pixels.shape[1]
        x = self._embed(pixels, ratio_ids)  # [N, T, P, D]
        patches = x.shape[2]
        x = pad(x, (0, 0, 0, self.rows - patches))
        mask = self._mask(ratio_ids, tiles, x.dtype)

        x = x.flatten(1, 2)  # [N, L, D]
        indices = self.vision.intermediate_layers
        entering = {}
        for index, layer in enumerate(self.local_layers):
            if index in indices:
                entering[index] = x
            x = layer(x, mask)
        x = self.norm_post(x)
        x = self.post_tile(x.unflatten(1, (tiles, self.rows)), ratio_ids).flatten(1, 2)
        for layer in self.global_layers:
            x = layer(x, mask)

        states = [
            x.unflatten(1, (tiles, self.rows))[:, :, :patches]
            for x in (x, *(entering[i] for i in indices))
        ]
        return states[0], states[1:]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """megatron's checkpoint form; it would take what is in a plain list for replicated."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name, layers in (("local", self.local_layers), ("global", self.global_layers)):
            for number, layer in enumerate(layers):
                path = f"{prefix}{name}_layers.{number}."
                state |= sharded_state_dict_default(
                    layer, path, sharded_offsets, metadata, tp_group=self.tp_group
                )
        return state

    def _embed(self, pixels: Tensor, ratio_ids: Tensor) -> Tensor:
        frames, tiles = pixels.shape[:2]
        x = self.patch_embedding(pixels.flatten(0, 1).to(self.class_embedding.dtype))
        x = x.flatten(2).transpose(1, 2).unflatten(0, (frames, tiles))  # [N, T, grid^2, D]
        x = self.pre_tile(x, ratio_ids)
        x = torch.cat((self.class_embedding.expand(frames, tiles, 1, -1), x), dim=2)
        return self.norm_pre(self.position(x, ratio_ids))

    def _mask(self, ratio_ids: Tensor, tiles: int, dtype: torch.dtype) -> Tensor | None:
        """The mask that is added to the scores, `[1 or N, 1, 1 or L, L]`; None where there is none.

        A row that stands for several counts as often. Llama-3.2-Vision has a mask, too: a padding
        query may not see a padding key. (transformers builds it as `padding @ padding.T x -inf`, in
        mllama's _prepare_aspect_ratio_attention_mask.)
        """
        device, rows = ratio_ids.device, self.rows
        if self.vision.full_attention and self.copies == 1:
            return None
        patch = torch.arange(rows, device=device).repeat(tiles)
        padding = patch >= self.vision.num_patches  # [L]
        counts = padding.to(dtype) * math.log(self.copies)
        if self.vision.full_attention:
            return counts[None, None, None]
        padding = padding[None]
        if tiles > 1:
            used = tiles_used(ratio_ids, self.vision).clamp(min=1)  # id 0 (no image): as one tile
            tile = torch.arange(tiles, device=device).repeat_interleave(rows)
            padding = padding | (tile >= used[:, None])  # [N, L]
        hidden = padding[:, None, :, None] & padding[:, None, None, :]
        return counts.expand(hidden.shape).masked_fill(hidden, -math.inf)


def concatenate_states(final: Tensor, intermediate: list[Tensor]) -> Tensor:
    """`[..., D]` each -> `[..., D x (1 + n)]`: final, then intermediates channel-major."""
    if not intermediate:
        return final
    return torch.cat((final, torch.stack(intermediate, dim=-1).flatten(-2)), dim=-1)
