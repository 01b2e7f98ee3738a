"""Gated cross-attention layer: text tokens attend the frames that they may see.

    x += tanh(attn_gate) * attention(RMSNorm(x), frames)
    x += tanh(mlp_gate)  * MLP(RMSNorm(x))            (zero for tokens that see no frame)

with Q = RoPE(q_norm(q)) at the token's position and K = k_norm(RoPE(k)) at the frame's. The
published model repeats K to all heads between rotation and norm; the norm works on each head
alone with one weight, so K stays at the number of KV heads here, with the same numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from moss_train.config import ModelConfig
from moss_train.model.frames import FrameBatch
from moss_train.model.norms import RMSNorm
from moss_train.model.rope import rotary_angles


class CrossAttentionLayer(MegatronModule):
    """One cross-attention layer of the decoder."""

    def __init__(
        self, model: ModelConfig, config: TransformerConfig, groups: ProcessGroupCollection
    ):
        super().__init__(config)
        self.text, self.rotate = model.text, model.cross_attention_rope
        self.backend = model.attention
        self.cp_group, self.tp_group = groups.cp, groups.tp
        self.recompute_core = config.recompute_granularity == "selective"
        width, eps = config.hidden_size, config.layernorm_epsilon
        head_dim = config.kv_channels
        assert head_dim is not None
        self.head_dim = head_dim
        self.input_norm = RMSNorm(config, width, eps)
        linear = {"bias": False, "skip_bias_add": True, "init_method": _unset}
        self.linear_q = ColumnParallelLinear(
            width, width, config=config, tp_group=groups.tp, gather_output=False, **linear
        )
        # Vision states are whole on every tensor rank (no sequence shards), and the gradient that
        # each rank's heads leave on them is summed once, in parallel/exchange.py.
        whole = copy.copy(config)
        whole.sequence_parallel = False
        self.linear_kv = ColumnParallelLinear(
            width,
            2 * head_dim * model.text.num_kv_heads,
            config=whole,
            tp_group=groups.tp,
            gather_output=False,
            disable_grad_reduce=True,
            **linear,
        )
        self.q_norm = RMSNorm(config, head_dim, eps)
        self.k_norm = RMSNorm(config, head_dim, eps)
        self.linear_proj = RowParallelLinear(
            width, width, config=config, tp_group=groups.tp, input_is_parallel=True, **linear
        )
        self.mlp_norm = RMSNorm(config, width, eps)
        self.mlp = MLP(
            config,
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=groups.tp,
        )
        self.attn_gate = nn.Parameter(torch.empty(1, dtype=config.params_dtype))
        self.mlp_gate = nn.Parameter(torch.empty(1, dtype=config.params_dtype))
        self._mark_partial_gradients(config)

    def _mark_partial_gradients(self, config: TransformerConfig) -> None:
        """Replicated parameters whose gradient on a tensor rank is one part of a sum."""
        if config.tensor_model_parallel_size > 1:
            for norm in (self.q_norm, self.k_norm):  # each rank has its own heads only
                norm.weight.partial_over_tensor = True  # type: ignore[attr-defined]
        if config.sequence_parallel:  # each rank has its own tokens only
            for gate in (self.attn_gate, self.mlp_gate):
                gate.partial_over_tensor = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor, angles: Tensor, frames: FrameBatch) -> Tensor:
        """One layer.

        Args:
            x: hidden states `[S, B, H]` (`[S / tensor, B, H]` with sequence parallelism).
            angles: rotary angles of the S tokens `[S, 1, 1, D]`.
            frames: the microbatch's frames with their states; x is returned where none is attended.
        """
        if not any(frames.rows):  # no frames, or only padding that no token attends
            return _Touch.apply(x, *(p for p in self.parameters() if p.requires_grad))
        attended, _ = self.linear_proj(self._attention(self.input_norm(x), angles, frames))
        x = x + self.attn_gate.tanh() * attended
        branch, _ = self.mlp(self.mlp_norm(x))
        return x + self.mlp_gate.tanh() * branch * self._rows(frames.sees, x)

    def _rows(self, sees: Tensor, x: Tensor) -> Tensor:
        """This rank's tokens of `sees` `[S, B]` as factors `[s, B, 1]`."""
        if x.shape[0] != sees.shape[0]:
            sees = sees.narrow(0, self.tp_group.rank() * x.shape[0], x.shape[0])
        return sees[..., None].to(x.dtype)

    def _attention(self, x: Tensor, angles: Tensor, frames: FrameBatch) -> Tensor:
        query, _ = self.linear_q(x)
        query = self.q_norm(query.unflatten(-1, (-1, self.head_dim)))  # [S, B, heads, D]
        assert frames.states is not None
        kv, _ = self.linear_kv(frames.states)
        key, value = kv.unflatten(-1, (-1, 2, self.head_dim)).unbind(-2)  # [F, T * P, kv heads, D]
        if self.rotate:
            query = self._rotate(query, angles)
            key = self._rotate(key, rotary_angles(self.text, frames.positions))
        key = self.k_norm(key)
        attend = attend_flex if self.backend == "flex" else attend_blocks
        if self.recompute_core and torch.is_grad_enabled():
            return checkpoint(attend, query, key, value, frames, use_reentrant=False)
        return attend(query, key, value, frames)

    def _rotate(self, x: Tensor, angles: Tensor) -> Tensor:
        return apply_rotary_pos_emb(x, angles, self.config, cp_group=self.cp_group)


def attend_blocks(query: Tensor, key: Tensor, value: Tensor, frames: FrameBatch) -> Tensor:
    """Softmax attention, block by block of `frames.rows`.

    Args:
        query: `[S, B, heads, D]`.
        key, value: `[F, T x P, kv heads, D]`.

    Returns:
        `[S, B, heads x D]`, zero for tokens in no block.
    """
    length, patches = query.shape[0], key.shape[1]
    query = query.permute(1, 2, 0, 3)  # [B, heads, S, D]
    key, value = (x.flatten(0, 1).transpose(0, 1) for x in (key, value))  # [kv heads, F * T * P, D]
    rows = []
    for row, blocks in enumerate(frames.rows):
        pieces, done = [], 0
        for block in blocks:
            pieces.append(_zeros(query, block.start - done))
            keys = slice(block.first * patches, block.last * patches)
            mask = block.mask
            if mask is not None:  # [tokens, frames x T] -> [tokens, frames x T x P]
                per_tile = patches * (block.last - block.first) // mask.shape[1]
                mask = mask.to(query.device).repeat_interleave(per_tile, dim=1)
            out = scaled_dot_product_attention(
                query[row, None, :, block.start : block.stop],
                key[None, :, keys],
                value[None, :, keys],
                attn_mask=mask,
                enable_gqa=True,
            )
            pieces.append(out[0])
            done = block.stop
        pieces.append(_zeros(query, length - done))
        rows.append(torch.cat(pieces, dim=1))  # [heads, S, D]
    return torch.stack(rows).permute(2, 0, 1, 3).flatten(2)


def _zeros(query: Tensor, tokens: int) -> Tensor:
    return query.new_zeros(query.shape[1], tokens, query.shape[3])


_flex: Callable | None = None


def attend_flex(query: Tensor, key: Tensor, value: Tensor, frames: FrameBatch) -> Tensor:
    """As `attend_blocks`, as one FlexAttention call with a block mask: for CUDA.

    Pays where a row has many blocks (a long video): one kernel in place of one a block.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    global _flex
    if _flex is None:
        _flex = torch.compile(flex_attention) if query.is_cuda else flex_attention
    length, patches = query.shape[0], key.shape[1]
    allowed = _token_sees_tile(frames, length, query.device)  # [B, S, F * T]
    per_tile = patches * key.shape[0] // allowed.shape[2]

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return allowed[b, q, kv // per_tile]

    rows, keys = query.shape[1], key.shape[0] * patches
    mask = create_block_mask(mask_mod, rows, None, length, keys, device=str(query.device))
    key, value = (x.flatten(0, 1).transpose(0, 1) for x in (key, value))
    key, value = (x.expand(rows, -1, -1, -1) for x in (key, value))
    out = _flex(query.permute(1, 2, 0, 3), key, value, block_mask=mask, enable_gqa=True)
    return out.permute(2, 0, 1, 3).flatten(2)


def _token_sees_tile(frames: FrameBatch, length: int, device: torch.device) -> Tensor:
    tiles = 1
    for block in (block for row in frames.rows for block in row if block.mask is not None):
        tiles = block.mask.shape[1] // (block.last - block.first)  # type: ignore[union-attr]
    allowed = torch.zeros(len(frames.rows), length, frames.count * tiles, dtype=torch.bool)
    for row, blocks in enumerate(frames.rows):
        for block in blocks:
            seen = allowed[row, block.start : block.stop, block.first * tiles : block.last * tiles]
            seen.copy_(torch.ones_like(seen) if block.mask is None else block.mask)
    return allowed.to(device)


class _Touch(torch.autograd.Function):
    """Identity on x that gives every parameter a zero gradient.

    A microbatch without frames skips the layer, yet megatron's overlapped gradient reduction waits
    for each parameter of a bucket to report.
    """

    @staticmethod
    def forward(ctx, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, *(p.new_zeros(()).expand_as(p) for p in ctx.saved_tensors)


def _unset(weight: Tensor) -> Tensor:
    """Weights are drawn by name later (convert/init.py), not by the layer."""
    return weight
