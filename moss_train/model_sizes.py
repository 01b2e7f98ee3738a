"""Which sizes of a model fit together: of a run's configuration, and of an imported config.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from moss_train.model_config import ModelConfig


def unfit_sizes(model: ModelConfig) -> Iterator[str]:
    """A line for all in which a model's sizes do not fit together, under the names of the fields
    of a run."""
    text, vision, projector = model.text, model.vision, model.projector
    yield from not_multiple("model.text.hidden_size", text.hidden_size, "num_heads", text.num_heads)
    yield from not_multiple(
        "model.text.num_heads", text.num_heads, "num_kv_heads", text.num_kv_heads
    )
    if text.hidden_size % text.num_heads == 0 and text.head_dim % 2:
        yield (
            f"model.text.hidden_size={text.hidden_size}: gives heads of {text.head_dim} with "
            f"num_heads={text.num_heads}: rotary positions want an even number"
        )
    scaling = text.rope_scaling
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        yield (
            f"model.text.rope_scaling.low_freq_factor={scaling.low_freq_factor}: must be less "
            f"than high_freq_factor={scaling.high_freq_factor}"
        )
    yield from not_multiple(
        "model.vision.hidden_size", vision.hidden_size, "num_heads", vision.num_heads
    )
    yield from not_multiple(
        "model.vision.image_size", vision.image_size, "patch_size", vision.patch_size
    )
    if projector.pool != "none":
        yield from not_multiple("the patch grid", vision.grid, "projector.stride", projector.stride)
    for name, layers, count, of in (
        ("model.text.cross_attention_layers", text.cross_attention_layers, text.num_layers, "text"),
        ("model.vision.intermediate_layers", vision.intermediate_layers, vision.num_layers,
         "vision"),
    ):  # fmt: skip
        outside = [layer for layer in layers if layer >= count]
        if outside:
            yield (
                f"{name}={outside}: layers are numbered 0..{count - 1} "
                f"(model.{of}.num_layers={count})"
            )
        twice = [layer for layer, times in Counter(layers).items() if times > 1]
        if twice:
            yield f"{name}={twice}: name each layer once"


def not_multiple(name: str, value: int, by: str, divisor: int) -> Iterator[str]:
    """A line where `value` is not a multiple of `divisor`."""
    if divisor <= 0 or value % divisor:
        yield f"{name}={value}: must be a multiple of {by}={divisor}"
