"""Rotary positions as a checkpoint's config.json says them, and as older tools saved them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moss_train.config import ConfigError
from moss_train.convert.config_section import Section
from moss_train.convert.source import HfFolder
from moss_train.model_config import RopeScalingConfig, TextConfig

FORMS = ("rope_parameters", "rope_scaling")
NEAR = 0.01  # relative: bf16 rounds a buffer by 0.4 %


def rope_of(section: Section, theta: float | None = None) -> tuple[float, RopeScalingConfig]:
    """Base and scaling.

    transformers 5 has all in `rope_parameters`; 4 has `rope_theta` beside `rope_scaling`. A file
    that has both must say the same in both, for the two read one each.

    Args:
        theta: the base where the file does not say it; None: it must.

    Raises:
        ConfigError: names the key that is missing, unknown, or stated in two ways.
    """
    ropes = [section.section(k) for k in FORMS if section.values.get(k)]
    bases = {
        f"{part.path}rope_theta": part.number("rope_theta")
        for part in (section, *ropes)
        if part.has("rope_theta")
    }
    scalings = {rope.path.rstrip("."): _scaling(rope) for rope in ropes}
    stated: dict[str, Any]
    for stated in (bases, scalings):
        values = list(stated.values())
        if any(value != values[0] for value in values):
            both = ", ".join(f"{key}: {value}" for key, value in stated.items())
            raise ConfigError(
                [
                    f"{section.file}: two rotary positions ({both}): keep the one that the model "
                    "was trained with"
                ]
            )
    if not bases and theta is None:
        raise ConfigError([f"{section.file}: {section.path}rope_theta is missing"])
    base = next(iter(bases.values()), theta)
    assert base is not None
    return base, next(iter(scalings.values()), RopeScalingConfig(factor=1.0))


def _scaling(rope: Section) -> RopeScalingConfig:
    rope.expect("partial_rotary_factor", 1.0)
    key, kind = "rope_type", "default"
    if any(rope.has(name) for name in ("rope_type", "type", "factor")):
        key, kind = rope.find("rope_type", "type")
    if kind == "default":
        return RopeScalingConfig(factor=1.0)
    if kind != "llama3":
        raise rope.error(key, kind, "'llama3' or 'default'")
    return RopeScalingConfig(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position=rope.integer("original_max_position_embeddings"),
    )


def saved_rope(folder: HfFolder, text: TextConfig) -> Iterator[str]:
    """A line where frequencies that are saved beside the weights are not those of config.json."""
    for name, stored in folder.buffers.items():
        if name.endswith(("rotary_emb.inv_freq", "rope.freqs")):
            if not is_rope_of(folder.read_stored(stored), text):
                yield (
                    f"{name}: is not that of rope_theta {text.rope_theta:g} and its scaling: "
                    "config.json's are taken, as transformers does"
                )
            return


def is_rope_of(buffer: Tensor, text: TextConfig) -> bool:
    """True where a saved `inv_freq` is the one of `text`, with its scaling or without."""
    inverse = text.rope_theta ** -(torch.arange(0, text.head_dim, 2).double() / text.head_dim)
    scaling = text.rope_scaling
    ratio = scaling.original_max_position * inverse / (2 * math.pi)
    span = max(scaling.high_freq_factor - scaling.low_freq_factor, 1e-9)
    smooth = ((ratio - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    scaled = (1 - smooth) * inverse / scaling.factor + smooth * inverse
    return buffer.shape == inverse.shape and any(
        torch.allclose(buffer.double(), inv_freq, rtol=NEAR, atol=0)
        for inv_freq in (inverse, scaled)
    )
