"""What a step keeps between its forward and its backward pass, from the configuration alone.

T tokens of a microbatch, n of them with a label, F rows of frames; width H; queries Q and keys K of
all heads; MLP M. Of a decoder layer whose weights train autograd keeps, in elements:

| | self-attention | cross-attention |
|---|---|---|
| the stream before and behind the attention | T H + n H | 2 T H |
| what the attention reads and gives | 2 T (Q + K) | 2 T Q + 3 F K |
| what the linear layers read | T H + n Q + n H + n M | T H + T Q + T H + T M |
| the first product of the MLP | 2 n M | 2 T M |
| what norms of queries, and gates, read | | T Q + 2 T H |

(n = T in all but the last layer.) With frozen weights nothing is kept for linear layers and gates,
and nothing at all where no gradient passes. `selective` does not keep the outputs of norms and
activation functions, which is 2 T H + T M; `full` keeps the input of each layer. Masks are kept
once by all cross-attention layers. Beside these there are fp32 numbers a row. Tests compare it with
what autograd keeps, and with the peak of steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from moss_train import hardware
from moss_train.config import Config
from moss_train.model.hf_mapping import parameters_of
from moss_train.model.projector import pooled_tokens

FP32 = 4


@dataclass(frozen=True)
class Batch:
    """The step of a replica.

    tokens, labels, frames: of its largest microbatch.
    masked: (token, frame) pairs that its cross-attention computes with a mask.
    microbatches, step_frames: of the step.
    """

    tokens: int
    labels: int
    frames: int
    masked: int
    microbatches: int
    step_frames: int


class DecoderActivations:
    """Bytes of activations of one microbatch of `batch`, on a rank of the layout."""

    def __init__(self, config: Config, batch: Batch):
        text, layout = config.model.text, config.parallel
        self.config, self.batch = config, batch
        self.size = hardware.DTYPES[config.model.dtype].itemsize
        self.width = text.hidden_size
        self.parts = layout.tensor if layout.sequence else 1  # of the tokens, outside of attention
        self.heads = text.num_heads / layout.tensor
        self.queries = self.heads * text.head_dim
        self.keys = text.num_kv_heads * text.head_dim / layout.tensor
        self.inner = text.mlp_size / layout.tensor
        self.patches = config.data.max_tiles * pooled_tokens(config.model)
        encoder = parameters_of(config.model, "vision", "projector")
        self.states_train = any(map(config.trains, encoder))

    def kept(self, first: int, last: int) -> float:
        """Bytes that layers [first, last) keep for their backward pass."""
        full = self.config.parallel.recompute == "full"
        cross = self.config.model.text.cross_attention_layers
        reached = self.config.trains("decoder.embedding.weight")
        reached |= self.config.adapter.name != "none"
        total = masks = 0.0
        for layer in range(last):
            trained = self.config.trains(f"decoder.layers.{layer}.mlp.linear_fc1.weight")
            sees = layer in cross and self.batch.frames > 0
            through = reached or trained or (sees and self.states_train)
            if layer >= first and through:
                total += self._input() if full else self.layer(layer, trained, reached)
                masks = self._masks() if sees else masks
            reached = through
        return total + masks

    def layer(self, number: int, trained: bool, reached: bool) -> float:
        """Bytes that one layer keeps, without full recomputation. trained: its weights train.
        reached: its input has a gradient."""
        if number not in self.config.model.text.cross_attention_layers:
            last = number == self.config.model.text.num_layers - 1
            shortened = last and not self.config.parallel.sequence
            return self._self_attention(self.batch.labels if shortened else None, trained)
        return self._cross_attention(trained, reached) if self.batch.frames else 0.0

    def _input(self) -> float:
        return self.size * self.batch.tokens * self.width / self.parts

    def _self_attention(self, after: int | None, trained: bool) -> float:
        tokens = self.batch.tokens
        after = tokens if after is None else after
        attended = tokens * 2 * (self.queries + self.keys)
        fp32 = tokens * (self.heads + 1 / self.parts) + after / self.parts
        read = 0.0
        if trained:
            read = after * self.queries
            if self.config.parallel.recompute != "selective":
                read += (tokens + after) * self.width / self.parts + after * self.inner
        stream = (tokens + after) * self.width / self.parts
        return self.size * (attended + stream + after * 2 * self.inner + read) + FP32 * fp32

    def _cross_attention(self, trained: bool, reached: bool) -> float:
        tokens, stream = self.batch.tokens, self.batch.tokens * self.width / self.parts
        frames = self.batch.frames * self.patches * 3 * self.keys
        kept = tokens * 2 * (self.queries + self.inner) + frames + stream
        fp32 = tokens * (self.heads + 1 / self.parts)
        if trained or reached:
            kept += stream + tokens * self.queries
            fp32 += tokens * (self.heads + 1 / self.parts)
        if trained:
            kept += 2 * stream + tokens * self.queries
            if self.config.parallel.recompute != "selective":
                kept += 2 * stream + tokens * self.inner
        return self.size * kept + FP32 * fp32

    def _masks(self) -> float:
        """Bytes of the masks, which all layers of a chunk share (`FramePlan.with_masks`)."""
        return self.size * self.batch.masked * self.patches * self.config.model.text.shared_heads

    def at_peak(self, stage: int) -> float:
        """Bytes on a pipeline stage when a backward pass begins: what its microbatches keep, and
        what this pass needs beside that."""
        layout, layers = self.config.parallel, self.config.model.text.num_layers
        size = layers // (layout.pipeline * layout.virtual)
        begins = [(v * layout.pipeline + stage) * size for v in range(layout.virtual)]
        # Chunks that have run forward and not backward (Narayanan et al. 2021).
        ahead = layout.pipeline - stage
        if layout.virtual > 1:
            ahead += ahead - 1 + (layout.virtual - 1) * layout.pipeline
        held = min(ahead, self.batch.microbatches * layout.virtual)
        kept = sum(self.kept(first, first + size) for first in begins) / layout.virtual
        passing = self._passing()
        if layout.recompute == "full":
            passing += max(
                self.layer(n, True, True) for first in begins for n in range(first, first + size)
            )
        if stage == layout.pipeline - 1:
            passing = max(passing, self.logits())
        return held * kept + passing

    def _passing(self) -> float:
        """Bytes that a backward pass needs beside what is kept, at the activation function of a
        layer: gradients of its output and input and of the layer's output, less what is not needed
        any more; the activation where it is computed again. Plain torch has one more of its size.
        """
        plain = self.config.model.kernels == "torch"
        again = self.config.parallel.recompute == "selective"
        inner = (2 + again + plain) * self.inner
        return self.size * self.batch.tokens * (inner + 2 * self.width / self.parts)

    def logits(self) -> float:
        """Bytes at the output head: its input before and behind the norm, the logits and all that
        the loss makes of them. Where the kernel runs (model/kernels.py), the gradient of the logits
        takes their place, and that of the weight comes then; plain torch has three tensors of the
        logits' size in fp32."""
        columns = self.config.model.text.vocab_size / self.config.parallel.tensor
        rows = self.batch.labels * 2 * self.size * self.width
        if self.config.model.kernels == "torch":
            return rows + self.batch.labels * columns * 3 * FP32
        return rows + self.size * columns * (self.batch.labels + self.width)
