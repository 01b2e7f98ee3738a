"""The decoder, or the part of it that one pipeline chunk holds.

Layers keep their global index as their name (`layers.7`), so parameter names do not depend on the
pipeline layout. Hidden states are `[S, B, H]`; with sequence parallelism `[S / tensor, B, H]`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.enums import ModelType
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import (
    MegatronModule,
    ModuleSpec,
    TransformerConfig,
    TransformerLayer,
    build_module,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.transformer.utils import sharded_state_dict_default
from megatron.core.utils import make_viewless_tensor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moss_train.config import ModelConfig
from moss_train.model.attention import core_attention
from moss_train.model.cross_attention import CrossAttentionLayer
from moss_train.model.frames import FrameBatch
from moss_train.model.loss import Targets, weighted_loss
from moss_train.model.norms import RMSNorm
from moss_train.model.rope import rotary_angles


@dataclass(frozen=True)
class Chunk:
    """The layers [first, last) of `total` that a pipeline chunk holds; `virtual` is its number."""

    first: int
    last: int
    total: int
    virtual: int | None = None

    @property
    def embeds(self) -> bool:
        """Holds the embedding."""
        return self.first == 0

    @property
    def predicts(self) -> bool:
        """Holds the final norm and the output head."""
        return self.last == self.total


def self_attention_spec(backend: str) -> ModuleSpec:
    """megatron's GPT layer with our norm and the chosen attention."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention.submodules.core_attention = core_attention(backend)
    spec.submodules.sharded_state_dict_keys_map = {}
    return spec


class Decoder(MegatronModule):
    """Embedding, a run of layers, final norm and output head: those that `chunk` says."""

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        chunk: Chunk,
        recompute: bool,
    ):
        super().__init__(config)
        self.text, self.chunk, self.recompute = model.text, chunk, recompute
        self.model_type = ModelType.encoder_or_decoder  # megatron's schedules ask for it
        self.vp_stage = chunk.virtual
        self.tp_group = groups.tp
        self.received: Tensor | None = None
        text = model.text
        if chunk.embeds:
            self.embedding = VocabParallelEmbedding(
                text.vocab_size + text.extra_embedding_rows,
                text.hidden_size,
                init_method=_unset,
                reduce_scatter_embeddings=config.sequence_parallel,
                config=config,
                tp_group=groups.tp,
            )
        self.layers = nn.ModuleDict(
            {str(i): self._layer(i, model, groups) for i in range(chunk.first, chunk.last)}
        )
        if chunk.predicts:
            self.final_norm = RMSNorm(config, text.hidden_size, text.norm_eps)
            whole = copy.copy(config)  # the head gets selected tokens, gathered below
            whole.sequence_parallel = False
            self.output = ColumnParallelLinear(
                text.hidden_size,
                text.vocab_size,
                config=whole,
                init_method=_unset,
                bias=False,
                gather_output=False,
                # Sequence shards: the gather's backward already sums over the tensor ranks.
                disable_grad_reduce=config.sequence_parallel,
                tp_group=groups.tp,
            )

    def _layer(self, index: int, model: ModelConfig, groups: ProcessGroupCollection) -> nn.Module:
        if index in model.text.cross_attention_layers:
            return CrossAttentionLayer(model, self.config, groups)
        offset = get_transformer_layer_offset(self.config, self.chunk.virtual, groups.pp.rank())
        return build_module(
            self_attention_spec(model.attention),
            config=self.config,
            layer_number=index + 1 - offset,
            pg_collection=groups,
            vp_stage=self.chunk.virtual,
        )

    def set_input_tensor(self, received: list[Tensor] | Tensor | None) -> None:
        """Called by megatron's schedules with what the previous stage sent."""
        self.received = received[0] if isinstance(received, list) else received

    def forward(
        self,
        tokens: Tensor,
        frames: FrameBatch,
        targets: Targets | None = None,
        total: Tensor | None = None,
    ) -> Tensor:
        """Runs this chunk.

        Args:
            tokens: `[B, S]`.
            frames: the microbatch's frames, with their projected states.
            targets: what to predict; None asks for logits.
            total: labels in the global batch (with targets).

        Returns:
            Hidden states `[S, B, H]` for the next stage; on the last stage the loss (a scalar),
            or logits `[B, S, V]`.
        """
        length = tokens.shape[1]
        x = self._embed(tokens) if self.chunk.embeds else self.received
        assert x is not None
        angles = rotary_angles(self.text, torch.arange(length, device=tokens.device))
        for layer in self.layers.values():
            x = self._run(layer, x, angles, frames)
        if not self.chunk.predicts:
            # The schedule frees what it has sent, which it cannot do with a view.
            return make_viewless_tensor(x, requires_grad=x.requires_grad, keep_graph=True)
        x = self.final_norm(x)
        if self.config.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, group=self.tp_group)
        if targets is None or total is None:
            return self._logits(x)
        selected = x.flatten(0, 1)[targets.rows][:, None]  # [n, 1, H]
        logits, _ = self.output(selected)
        return weighted_loss(logits, targets, total)

    def _embed(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return x if self.config.sequence_parallel else x.transpose(0, 1).contiguous()

    def _run(self, layer: nn.Module, x: Tensor, angles: Tensor, frames: FrameBatch) -> Tensor:
        call: Callable[[Tensor], Tensor]
        if isinstance(layer, TransformerLayer):

            def call(x: Tensor) -> Tensor:
                return layer(x, attention_mask=None, rotary_pos_emb=angles)[0]
        else:

            def call(x: Tensor) -> Tensor:
                return layer(x, angles, frames)

        if self.recompute and torch.is_grad_enabled():
            return checkpoint(call, x, use_reentrant=False, preserve_rng_state=False)
        return call(x)

    def _logits(self, x: Tensor) -> Tensor:
        logits, _ = self.output(x, runtime_gather_output=True)
        return logits.transpose(0, 1)

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


def _unset(weight: Tensor) -> Tensor:
    """Weights are drawn by name later (convert/init.py), not by the layer."""
    return weight
