"""Gated cross-attention layer: text tokens attend the frames that they may see.

    x += tanh(attn_gate) * attention(RMSNorm(x), frames)
    x += tanh(mlp_gate)  * MLP(RMSNorm(x))            (zero for tokens that see no frame)

with Q = RoPE(q_norm(q)) at the token's position and K = k_norm(RoPE(k)) at the frame's. The
published model repeats K to all heads between rotation and norm; the norm works on each head
alone with one weight, so K stays at the number of KV heads here, with the same numbers.
"""

from __future__ import annotations

import copy

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor, nn
from torch.nn.functional import pad

from moss_train.model.attention import Core, frames_core
from moss_train.model.flex_attention import attend_flex
from moss_train.model.frame_plan import FramePlan
from moss_train.model.linear import ColumnLinear, RowLinear, unset
from moss_train.model.mlp import FeedForward
from moss_train.model.norms import RMSNorm
from moss_train.model.rope import Rotation
from moss_train.model.sdpa import attend, attend_fused
from moss_train.model_config import ModelConfig


class CrossAttentionLayer(MegatronModule):
    """One cross-attention layer of the decoder."""

    def __init__(
        self, model: ModelConfig, config: TransformerConfig, groups: ProcessGroupCollection
    ):
        super().__init__(config)
        self.core, self.flex_backend = frames_core(model.attention), model.flex_backend
        self.rotate = model.cross_attention_rope
        self.tp_group = groups.tp
        width, eps = config.hidden_size, config.layernorm_epsilon
        head_dim = config.kv_channels
        assert head_dim is not None
        self.head_dim = head_dim
        self.input_norm = RMSNorm(config, width, eps)
        linear = {"bias": False, "skip_bias_add": True, "init_method": unset}
        self.linear_q = ColumnLinear(
            width, width, config=config, tp_group=groups.tp, gather_output=False, **linear
        )
        # Vision states are whole on every tensor rank (no sequence shards), and the gradient that
        # each rank's heads leave on them is summed once, in parallel/exchange.py.
        whole = copy.copy(config)
        whole.sequence_parallel = False
        self.linear_kv = ColumnLinear(
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
        self.linear_proj = RowLinear(
            width, width, config=config, tp_group=groups.tp, input_is_parallel=True, **linear
        )
        self.mlp_norm = RMSNorm(config, width, eps)
        self.mlp = FeedForward(config, groups)
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

    def forward(
        self,
        x: Tensor,
        frames: FramePlan,
        token_rotation: Rotation,
        frame_rotation: Rotation | None,
    ) -> Tensor:
        """One layer.

        Args:
            x: hidden states `[T, 1, H]` (`[T / tensor, 1, H]` with sequence parallelism).
            frames: the microbatch's frames with their states; x is returned where none is attended.
            token_rotation: of the attending tokens. frame_rotation: of the frames' positions.
        """
        if not len(frames.tokens):  # no frames, or only padding that no token attends
            return _Touch.apply(x, *(p for p in self.parameters() if p.requires_grad))
        # Tokens that attend nothing pass by. Of sequence shards each rank would have another count
        # of them: these go through whole.
        own = x if self.config.sequence_parallel else frames.attending.gather(x)
        attended, _ = self.linear_proj(
            self._attention(self.input_norm(own), frames, token_rotation, frame_rotation)
        )
        attended = self.attn_gate.tanh() * attended
        branch = self.mlp(self.mlp_norm(own + attended))
        added = attended + self.mlp_gate.tanh() * self._sees(frames, len(own), x.dtype) * branch
        return x + (added if self.config.sequence_parallel else frames.attending.scatter(added))

    def _sees(self, frames: FramePlan, count: int, dtype: torch.dtype) -> Tensor:
        """Whether this rank's tokens see a frame, as factors `[count, 1, 1]`."""
        if self.config.sequence_parallel:
            sees = frames.sees.narrow(0, self.tp_group.rank() * count, count)
        else:
            sees = frames.sees[frames.tokens]
        return sees[:, None, None].to(dtype)

    def _attention(
        self,
        x: Tensor,
        frames: FramePlan,
        token_rotation: Rotation,
        frame_rotation: Rotation | None,
    ) -> Tensor:
        query, _ = self.linear_q(x)
        if self.config.sequence_parallel:  # now of all T tokens
            query = frames.attending.gather(query)
        query = self.q_norm(query.squeeze(1).unflatten(-1, (-1, self.head_dim)))  # [n, heads, D]
        assert frames.states is not None
        kv, _ = self.linear_kv(frames.states)
        key, value = kv.unflatten(-1, (-1, 2, self.head_dim)).unbind(-2)  # [F, P, kv heads, D]
        if self.rotate:
            assert frame_rotation is not None
            query, key = token_rotation(query), frame_rotation(key)
        key = self.k_norm(key)
        out = attend_frames(query, key, value, frames, self.core, self.flex_backend)
        if self.config.sequence_parallel:
            out = frames.attending.scatter(out)
        return out.flatten(1)[:, None]  # [n or T, 1, heads x D]


def attend_frames(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    frames: FramePlan,
    core: Core | None = None,
    flex_backend: str = "triton",
) -> Tensor:
    """Softmax attention of tokens over frames, in the form that was planned.

    Args:
        query: of the tokens that attend a frame, `frames.tokens`: `[n, heads, D]`.
        key, value: `[F, T x P, kv heads, D]`.
        frames: with masks for these heads (`FramePlan.with_masks`).
        core: computes padded batches and blocks (attention.frames_core); None: torch.
        flex_backend: `model.flex_backend`, where FlexAttention was planned.

    Returns:
        `[n, heads, D]`.
    """
    if frames.padded is not None:
        return attend_padded(query, key, value, frames, core or attend)
    if frames.flex is not None:
        return attend_flex(query, key, value, frames.flex, flex_backend)
    return attend_blocks(query, key, value, frames, core or attend_fused)


def attend_blocks(
    query: Tensor, key: Tensor, value: Tensor, frames: FramePlan, core: Core = attend_fused
) -> Tensor:
    """As `attend_frames`, block by block of `frames.blocks`."""
    blocks, patches = frames.blocks, key.shape[1]
    if frames.slots > len(key):
        key, value = (pad(x, (0,) * 7 + (frames.slots - len(key),)) for x in (key, value))
    queries = frames.rows.scatter(query).split([block.size for block in blocks])
    windows = [(b.first * patches, b.last * patches) for b in blocks]
    keys, values = (_Windows.apply(x.flatten(0, 1), windows) for x in (key, value))
    out = []
    for block, *heads in zip(blocks, queries, keys, values, strict=True):
        q, k, v = (x[None] for x in heads)  # [1, tokens, heads, D]
        out.append(core(q, k, v, block.mask)[0])
    return frames.rows.gather(torch.cat(out))


def attend_padded(
    query: Tensor, key: Tensor, value: Tensor, frames: FramePlan, core: Core = attend
) -> Tensor:
    """As `attend_frames`, for many short sequences, all of them at once."""
    padded = frames.padded
    assert padded is not None
    batch = padded.shape[0]
    q = padded.tokens.scatter(query).unflatten(0, (batch, -1))  # [B, S, heads, D]
    k, v = (
        padded.frames.scatter(x).unflatten(0, (batch, -1)).flatten(1, 2) for x in (key, value)
    )  # [B, F x T x P, kv heads, D]
    return padded.tokens.gather(core(q, k, v, padded.mask).flatten(0, 1))


class _Windows(torch.autograd.Function):
    """Slices `x[start:stop]`, which may overlap.

    Autograd's own slices would each make a gradient of the whole x: for many blocks over a long
    video far more memory traffic than the attention itself.
    """

    @staticmethod
    def forward(ctx, x: Tensor, windows: list[tuple[int, int]]) -> tuple[Tensor, ...]:
        ctx.windows, ctx.length = windows, len(x)
        return tuple(x[start:stop] for start, stop in windows)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        # In fp32 where they are bf16: many blocks of a stream see the same frame.
        dtype = torch.promote_types(grads[0].dtype, torch.float32)
        total = grads[0].new_zeros(ctx.length, *grads[0].shape[1:], dtype=dtype)
        for (start, stop), grad in zip(ctx.windows, grads, strict=True):
            total[start:stop] += grad
        return total.to(grads[0].dtype), None


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
