"""Self-attention of the decoder and of the vision tower, and the decoder's layer around it."""

from __future__ import annotations

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from moss_train.model.attention import attention_core
from moss_train.model.gather_rows import RowSubset
from moss_train.model.linear import ColumnLinear, RowLinear, unset
from moss_train.model.mlp import FeedForward
from moss_train.model.norms import RMSNorm
from moss_train.model.packed_text import PackedText
from moss_train.model.rope import Rotation


class SelfAttention(MegatronModule):
    """Projections to query, key and value (interleaved by KV head), attention, projection back."""

    def __init__(
        self,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        backend: str,
        number: int,
        text: bool,
    ):
        super().__init__(config)
        self.tp_group = groups.tp
        heads, kv_heads = config.num_attention_heads, config.num_query_groups
        head_dim = config.kv_channels
        assert head_dim is not None
        assert kv_heads is not None
        self.head_dim, self.shared = head_dim, heads // kv_heads  # query heads of a KV head
        linear = {"bias": False, "skip_bias_add": True, "init_method": unset, "config": config}
        self.linear_qkv = ColumnLinear(
            config.hidden_size,
            (heads + 2 * kv_heads) * head_dim,
            tp_group=groups.tp,
            gather_output=False,
            **linear,
        )
        self.linear_proj = RowLinear(
            heads * head_dim,
            config.hidden_size,
            tp_group=groups.tp,
            input_is_parallel=True,
            **linear,
        )
        self.core = attention_core(backend, config, groups, number, text)

    def forward(
        self,
        x: Tensor,
        layout: PackedText | Tensor | None,
        rotation: Rotation | None = None,
        only: RowSubset | None = None,
    ) -> Tensor:
        """Attends.

        Args:
            x: `[T, 1, H]` of packed text, or `[N, L, H]` of frames.
            layout: the text's, or the frames' mask `[N, 1, L, L]`, None for none.
            rotation: of the text's positions.
            only: rows of x that the caller wants; None for all.
        """
        mixed, _ = self.linear_qkv(x)  # all tokens, also where x is a sequence shard
        whole = mixed.shape[:2]
        mixed = mixed.unflatten(-1, (-1, self.shared + 2, self.head_dim))
        if isinstance(layout, PackedText):
            mixed = mixed.squeeze(1)
        if rotation is None:
            query, key, value = mixed.split((self.shared, 1, 1), dim=-2)
        else:  # queries and keys of a KV head lie side by side: one rotation for both
            rotated, value = mixed.split((self.shared + 1, 1), dim=-2)
            query, key = rotation(rotated).split((self.shared, 1), dim=-2)
        heads = (query.flatten(-3, -2), key.squeeze(-2), value.squeeze(-2))  # [..., heads, D]
        out = self.core(*heads, layout).reshape(*whole, -1)
        return self.linear_proj(out if only is None else only.gather(out))[0]


class SelfAttentionLayer(MegatronModule):
    """One of the decoder's layers whose tokens attend the text before them: Llama's."""

    def __init__(
        self, config: TransformerConfig, groups: ProcessGroupCollection, backend: str, number: int
    ):
        super().__init__(config)
        self.tp_group = groups.tp
        width, eps = config.hidden_size, config.layernorm_epsilon
        self.input_norm = RMSNorm(config, width, eps)
        self.attention = SelfAttention(config, groups, backend, number, text=True)
        self.mlp_norm = RMSNorm(config, width, eps)
        self.mlp = FeedForward(config, groups)

    def forward(
        self, x: Tensor, text: PackedText, rotation: Rotation, only: RowSubset | None = None
    ) -> Tensor:
        """`[T, 1, H]` -> `[T, 1, H]` (`T / tensor` with sequence parallelism), or of the rows
        `only` alone, of which all others are keys and values.
        """
        attended = self.attention(self.input_norm(x), text, rotation, only)
        x = (x if only is None else only.gather(x)) + attended
        return x + self.mlp(self.mlp_norm(x))
