"""Model FLOPs of one optimizer step: the multiplications and additions that the step needs.

What is counted. Matrix products only; norms, rotations, softmax and the optimizer are left out.
With `[m, k] x [k, n]` = 2mkn:

- a linear layer of `w` weights costs 2w a token forward. Backward costs 2w for the gradient of its
  input, where anything before it trains, and 2w for the gradient of its weights, where they train;
- attention of `p` (query, key) pairs costs 2pH for the scores and 2pH for the weighted values,
  H = heads x head size (KV heads that are shared change the projections, not the pairs). Backward
  has four such products: for the values, the probabilities, the queries and the keys: 8pH.

What is needed, as opposed to what is computed:

- text: S (S + 1) / 2 pairs a sequence, the causal half; tokens without padding; no cross-attention
  layers for tokens that attend no frame. Cross-attention: the pairs of `FramePlan.attended()`.
  Behind the last self-attention, tokens without a label are not needed any more;
- a frozen tower runs forward only. With a frozen decoder the gradient runs from the loss down to
  the K and V of the first cross-attention layer, and stops there: no weights, no queries of that
  layer, no layer below it, and no backward pass for sequences without a frame;
- a forward pass that runs a second time does not count: see `StepFlops.recomputed`.

The counts are totals over all ranks, whatever the layout. FLOP/s of a rank are
`total / step_time_s / ranks`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from moss_train.model.frame_plan import FramePlan
from moss_train.model.projector import pooled_tokens
from moss_train.model.vision import rows_of_tile
from moss_train.model_config import ModelConfig


@dataclass(frozen=True)
class TrainedParts:
    """Which thirds of the model have trainable weights. A third counts as wholly trainable."""

    vision: bool
    projector: bool
    decoder: bool

    @property
    def states(self) -> bool:
        """The frames' states need a gradient."""
        return self.vision or self.projector


@dataclass(frozen=True)
class StepCounts:
    """What a step works on. All are sums, so those of microbatches and of ranks can be added.

    frames: frames encoded.
    attended: (token, frame) pairs of the cross-attention (one layer).
    attending: text tokens that attend a frame.
    tokens, pairs, labels: of sequences with a frame: text tokens, (token, token) pairs of the
        self-attention (one layer), positions that go through the output head.
    text_tokens, text_pairs, text_labels: the same of sequences without any frame.
    """

    frames: int = 0
    attended: int = 0
    attending: int = 0
    tokens: int = 0
    pairs: int = 0
    labels: int = 0
    text_tokens: int = 0
    text_pairs: int = 0
    text_labels: int = 0

    def __add__(self, other: StepCounts) -> StepCounts:
        names = (f.name for f in fields(self))
        return StepCounts(*(getattr(self, name) + getattr(other, name) for name in names))


@dataclass(frozen=True)
class Part:
    """FLOPs of one part of the model."""

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward

    def __add__(self, other: Part) -> Part:
        return Part(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of a step over all ranks, by part. Attention parts are scores and weighted values.

    vision: the tower: patches, linear layers, attention.
    projector: the linear layer, and the convolution of `channel_fusion`.
    decoder_linear: linear layers of self- and cross-attention layers, K/V of frames included.
    self_attention, cross_attention: the decoder's.
    head: the output head, at positions with a label.
    recomputed: forward FLOPs of what activation recomputation runs again, not in `total`. At most:
        torch ends a recomputation early once it has what the backward pass reads.
    """

    vision: Part = Part()
    projector: Part = Part()
    decoder_linear: Part = Part()
    self_attention: Part = Part()
    cross_attention: Part = Part()
    head: Part = Part()
    recomputed: int = 0

    @property
    def model(self) -> Part:
        """The sum of all parts."""
        parts = (self.vision, self.projector, self.decoder_linear)
        return sum((*parts, self.self_attention, self.cross_attention, self.head), Part())

    @property
    def total(self) -> int:
        """Model FLOPs, forward and backward."""
        return self.model.total

    def __add__(self, other: StepFlops) -> StepFlops:
        names = (f.name for f in fields(self))
        return StepFlops(*(getattr(self, name) + getattr(other, name) for name in names))


def count_microbatch(lengths: list[int], loss_positions: Tensor, frames: FramePlan) -> StepCounts:
    """The counts of a microbatch of packed sequences.

    Args:
        lengths: tokens of each sequence without padding.
        loss_positions: index in the microbatch of each position with a label.
        frames: the microbatch's frames.
    """
    seeing, text = [0, 0, 0], [0, 0, 0]
    ends = torch.tensor(lengths).cumsum(0)
    labels = torch.bincount(
        torch.searchsorted(ends, loss_positions, right=True), minlength=len(lengths)
    )
    attends = (frames.last > frames.first)[: sum(lengths)].split(lengths)
    for length, count, attending in zip(lengths, labels.tolist(), attends, strict=True):
        own = (length, length * (length + 1) // 2, count)
        sums = seeing if attending.any() else text
        sums[:] = [a + b for a, b in zip(sums, own, strict=True)]
    return StepCounts(frames.count, frames.attended(), len(frames.tokens), *seeing, *text)


def step_flops(
    model: ModelConfig,
    trained: TrainedParts,
    counts: StepCounts,
    tiles: int = 1,
    recompute: str = "none",
    kept_frames: int = 0,
) -> StepFlops:
    """Model FLOPs of a step; the module's docstring derives them.

    Args:
        trained: what is trained.
        counts: sums over the step's microbatches and ranks.
        tiles: tiles T of every frame (`data.max_tiles`), unused ones included: they are computed.
        recompute: `parallel.recompute`: full (decoder layers), none or selective, which runs no
            product again. `model.vision.recompute` says whether a tower that trains runs twice,
            and the projector behind it.
        kept_frames: frames that it runs once.
    """
    vision_tokens = tiles * pooled_tokens(model)  # of a frame
    seeing = _Sequences(
        counts.tokens,
        counts.pairs,
        counts.labels,
        counts.attending,
        counts.frames * vision_tokens,
        counts.attended * vision_tokens,
    )
    text = _Sequences(counts.text_tokens, counts.text_pairs, counts.text_labels, 0, 0, 0)
    twice = counts.frames - kept_frames if trained.vision and model.vision.recompute else 0
    vision, again = (_vision(model, trained, n, tiles) for n in (counts.frames, twice))
    projector, too = (_projector(model, trained, n * tiles) for n in (counts.frames, twice))
    encoder = StepFlops(vision, projector, recomputed=again.forward + too.forward)
    halves = [_decoder(model, trained, part, recompute) for part in (seeing, text)]
    return encoder + halves[0] + halves[1]


@dataclass(frozen=True)
class _Sequences:
    """Sequences of text that are alike: all of them see frames, or none."""

    tokens: int
    pairs: int
    labels: int
    attending: int  # tokens
    vision_tokens: int  # that K and V are made of
    vision_pairs: int  # (token, vision token)


def _linear(forward: int, inputs: bool, weights: bool) -> Part:
    """A linear layer: backward as much again for the gradients of its inputs, of its weights."""
    return Part(forward, forward * (inputs + weights))


def _attention(pairs: int, width: int, products: int) -> Part:
    """Two products forward, and `products` of the four of the backward pass."""
    return Part(4 * pairs * width, 2 * pairs * width * products)


def _vision(model: ModelConfig, trained: TrainedParts, frames: int, tiles: int) -> Part:
    """The tower over `frames` of T tiles: L = T x rows attend each other, L^2 pairs."""
    vision, train, width = model.vision, trained.vision, model.vision.hidden_size
    length = tiles * rows_of_tile(vision, model.attention)[0]
    patches = 2 * frames * tiles * vision.grid**2 * 3 * vision.patch_size**2 * width
    weights = 4 * width**2 + 2 * width * vision.mlp_size  # q, k, v, o; fc1, fc2
    layers = frames * (vision.num_layers + vision.num_global_layers)
    return (
        _linear(patches, inputs=False, weights=train)  # pixels need no gradient
        + _linear(2 * layers * length * weights, inputs=train, weights=train)
        + _attention(layers * length**2, width, 4 * train)
    )


def _projector(model: ModelConfig, trained: TrainedParts, tiles: int) -> Part:
    """The projection of `tiles` tiles; pooling without weights costs no matrix product."""
    width, stride = model.vision.output_size, model.projector.stride
    tokens = tiles * pooled_tokens(model)
    fused = model.projector.pool == "channel_fusion"
    linear = _linear(
        2 * tokens * width * model.text.hidden_size,
        inputs=trained.vision or (fused and trained.projector),
        weights=trained.projector,
    )
    if not fused:
        return linear
    cells = tokens - tiles  # the class token is not pooled
    return linear + _linear(2 * cells * (width * stride) ** 2, trained.vision, trained.projector)


def _decoder(
    model: ModelConfig, trained: TrainedParts, sequences: _Sequences, recompute: str
) -> StepFlops:
    """The decoder over `sequences`. `inputs`: the next layer's input needs a gradient."""
    text, inputs, sums = model.text, trained.decoder, StepFlops()
    for index in range(text.num_layers):
        if index not in text.cross_attention_layers:
            last = index == text.num_layers - 1
            layer = _self_layer(
                model, trained, sequences, inputs, sequences.labels if last else sequences.tokens
            )
        elif sequences.vision_tokens:
            layer = _cross_layer(model, trained, sequences, inputs)
            inputs = inputs or trained.states
        else:
            continue
        sums += layer
        if inputs and recompute == "full":  # nothing is run again where no gradient passes
            sums += StepFlops(recomputed=layer.model.forward)
    head = 2 * sequences.labels * text.hidden_size * text.vocab_size
    return sums + StepFlops(head=_linear(head, inputs, trained.decoder))


def _mlp_weights(model: ModelConfig) -> int:
    return 3 * model.text.hidden_size * model.text.mlp_size  # gate, up, down


def _kv_weights(model: ModelConfig) -> int:
    return 2 * model.text.hidden_size * model.text.num_kv_heads * model.text.head_dim


def _self_layer(
    model: ModelConfig, trained: TrainedParts, sequences: _Sequences, inputs: bool, outputs: int
) -> StepFlops:
    """`outputs`: tokens whose output is needed; the others are keys and values only."""
    width = model.text.hidden_size
    first = 2 * sequences.tokens * (width**2 + _kv_weights(model))  # q, k, v
    rest = 2 * outputs * (width**2 + _mlp_weights(model))  # o, MLP
    return StepFlops(
        decoder_linear=_linear(first + rest, inputs, trained.decoder),
        self_attention=_attention(sequences.pairs, width, 4 * inputs),
    )


def _cross_layer(
    model: ModelConfig, trained: TrainedParts, sequences: _Sequences, inputs: bool
) -> StepFlops:
    width, train = model.text.hidden_size, trained.decoder
    outputs = train or trained.states
    query = _linear(2 * sequences.attending * width**2, inputs, train)
    rest = _linear(2 * sequences.attending * (width**2 + _mlp_weights(model)), outputs, train)
    kv = _linear(2 * sequences.vision_tokens * _kv_weights(model), trained.states, train)
    products = 3 * outputs + inputs  # values, probabilities, keys; queries
    return StepFlops(
        decoder_linear=query + rest + kv,
        cross_attention=_attention(sequences.vision_pairs, width, products),
    )
