"""The decoder, or the part of it that one pipeline chunk holds.

Layers keep their global index as their name (`layers.7`), so parameter names do not depend on the
pipeline layout. Hidden states are `[T, 1, H]`: the T tokens of a microbatch (packed_text.py), and
megatron's batch dimension; with sequence parallelism `[T / tensor, 1, H]`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default
from megatron.core.utils import make_viewless_tensor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moss_train.model.cross_attention import CrossAttentionLayer
from moss_train.model.frame_plan import FramePlan
from moss_train.model.gather_rows import RowSubset
from moss_train.model.linear import ColumnLinear, unset
from moss_train.model.loss import Targets, weighted_loss
from moss_train.model.norms import RMSNorm
from moss_train.model.packed_text import PackedText
from moss_train.model.projector import pooled_tokens
from moss_train.model.rope import Rotation
from moss_train.model.self_attention import SelfAttentionLayer
from moss_train.model_config import ModelConfig


@dataclass(frozen=True)
class Chunk:
    """The layers [first, last) of `total` that a pipeline chunk holds; `virtual` is its number."""

    first: int
    last: int
    total: int
    virtual: int | None = None

    @property
    def pre_process(self) -> bool:
        """Holds the embedding (megatron's word)."""
        return self.first == 0

    @property
    def post_process(self) -> bool:
        """Holds the final norm and the output head (megatron's word)."""
        return self.last == self.total


class Decoder(MegatronModule):
    """Embedding, a run of layers, final norm and output head: those of `chunk`."""

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        chunk: Chunk,
        recompute: bool,
    ):
        super().__init__(config)
        self.model, self.text, self.chunk, self.recompute = model, model.text, chunk, recompute
        self.model_type = ModelType.encoder_or_decoder  # megatron's schedules ask for it
        self.vp_stage = chunk.virtual
        self.tp_group = groups.tp
        self.received: Tensor | None = None
        text = model.text
        if chunk.pre_process:
            self.embedding = VocabParallelEmbedding(
                text.vocab_size + text.extra_embedding_rows,
                text.hidden_size,
                init_method=unset,
                reduce_scatter_embeddings=config.sequence_parallel,
                config=config,
                tp_group=groups.tp,
            )
        self.layers = nn.ModuleDict(
            {str(i): self._layer(i, model, groups) for i in range(chunk.first, chunk.last)}
        )
        if chunk.post_process:
            self.final_norm = RMSNorm(config, text.hidden_size, text.norm_eps)
            whole = copy.copy(config)  # the head gets selected tokens, gathered below
            whole.sequence_parallel = False
            whole.kernels = replace(whole.kernels, fp8=None)  # logits want all bits
            self.output = ColumnLinear(
                text.hidden_size,
                text.vocab_size,
                config=whole,
                init_method=unset,
                bias=False,
                gather_output=False,
                # Sequence shards: the gather's backward already sums over the tensor ranks.
                disable_grad_reduce=config.sequence_parallel,
                tp_group=groups.tp,
            )

    def _layer(self, index: int, model: ModelConfig, groups: ProcessGroupCollection) -> nn.Module:
        if index in model.text.cross_attention_layers:
            return CrossAttentionLayer(model, self.config, groups)
        return SelfAttentionLayer(self.config, groups, model.attention, index + 1)

    def set_input_tensor(self, received: list[Tensor] | Tensor | None) -> None:
        """Called by megatron's schedules with what the previous stage sent."""
        self.received = received[0] if isinstance(received, list) else received

    def forward(
        self,
        text: PackedText,
        frames: FramePlan,
        targets: Targets | None = None,
        total: Tensor | None = None,
    ) -> Tensor:
        """Runs this chunk.

        Args:
            text: the microbatch's T tokens.
            frames: its frames, with their projected states.
            targets: what to predict; None asks for the logits of all tokens.
            total: labels in the global batch; None asks for logits.

        Returns:
            Hidden states `[T, 1, H]` for the next stage; on the last stage the loss (a scalar),
            or logits `[T, V]`, or those of the targets' positions `[n, V]`.
        """
        x = self._embed(text.tokens) if self.chunk.pre_process else self.received
        assert x is not None
        rotation = partial(Rotation.of, self.text, dtype=x.dtype, kernel=self.config.kernels.rotate)
        token_rotation = rotation(text.positions)
        attending_rotation = rotation(text.positions[frames.tokens])
        frame_rotation = rotation(frames.positions) if len(frames.tokens) else None
        frames = self._with_masks(frames, x.dtype)
        loss_positions = self._loss_positions(targets, len(text.tokens))
        for index, layer in self.layers.items():
            if isinstance(layer, CrossAttentionLayer):
                x = self._run(layer, x, frames, attending_rotation, frame_rotation)
            else:
                only = loss_positions if int(index) == self.chunk.total - 1 else None
                x = self._run(layer, x, text, token_rotation, only)
        if not self.chunk.post_process:
            # The schedule frees what it has sent, which it cannot do with a view.
            return make_viewless_tensor(x, requires_grad=x.requires_grad, keep_graph=True)
        x = self.final_norm(x)
        if self.config.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, group=self.tp_group)
        if targets is None:
            return self._logits(x)
        if loss_positions is None:
            x = x.index_select(0, targets.positions)
        if total is None:
            return self._logits(x)
        logits, _ = self.output(x)  # [n, 1, V / tensor]
        return weighted_loss(logits, targets, total, self.tp_group, self.config.kernels.statistics)

    def _with_masks(self, frames: FramePlan, dtype: torch.dtype) -> FramePlan:
        """The frames with masks for the layers here that attend them, made once for all of them."""
        attend = any(isinstance(layer, CrossAttentionLayer) for layer in self.layers.values())
        if not attend or not len(frames.tokens):
            return frames
        return frames.with_masks(self.text.shared_heads, pooled_tokens(self.model), dtype)

    def _loss_positions(self, targets: Targets | None, total: int) -> RowSubset | None:
        """The loss positions, where the last layer can compute these rows alone; else None."""
        if targets is None or self.config.sequence_parallel or not self.chunk.post_process:
            return None
        last = self.layers[str(self.chunk.total - 1)]
        return RowSubset(targets.positions, total) if isinstance(last, SelfAttentionLayer) else None

    def _embed(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens[None])  # [1, T, H], or [T / tensor, 1, H]
        return x if self.config.sequence_parallel else x.view(len(tokens), 1, -1)

    def _run(self, layer: nn.Module, x: Tensor, *inputs: Any) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(layer, x, *inputs, use_reentrant=False, preserve_rng_state=False)
        return layer(x, *inputs)

    def _logits(self, x: Tensor) -> Tensor:
        logits, _ = self.output(x[:, 0])
        return gather_from_tensor_model_parallel_region(logits, group=self.tp_group)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple = (),
        metadata: dict | None = None,
    ) -> dict:
        """megatron's checkpoint form; layer names are global, so no pipeline offsets are needed."""
        state: dict = {}
        for name, module in self.named_children():
            parts = module.items() if isinstance(module, nn.ModuleDict) else [("", module)]
            for key, part in parts:
                path = f"{prefix}{name}.{key}." if key else f"{prefix}{name}."
                state.update(
                    sharded_state_dict_default(part, path, (), metadata, tp_group=self.tp_group)
                )
        return state
