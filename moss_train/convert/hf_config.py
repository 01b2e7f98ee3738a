"""A checkpoint's config.json (HF Mllama, or MOSS-Video's extension of it) -> ModelConfig."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.aspect_ratios import supported_aspect_ratios
from moss_train.config import (
    POOLS,
    ConfigError,
    ModelConfig,
    ProjectorConfig,
    RopeScalingConfig,
    TextConfig,
    VisionConfig,
)
from moss_train.hardware import DTYPES

EXTRA_EMBEDDING_ROWS = 8  # transformers builds Mllama's embedding with vocab_size + 8 rows
# Our names of dtypes by transformers' names, which are torch's.
HF_DTYPES = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}

ARCHITECTURES = ("moss", "mllama")


def model_config_from_hf(
    source: str | Path | Mapping[str, Any], arch: str | None = None, dtype: str | None = None
) -> ModelConfig:
    """The model that a checkpoint was made with.

    With pooling keys (`pool_mode` and `pool_stride`, or `pool: {mode, stride}`) it is MOSS-Video:
    unmasked vision attention and rotary positions in the cross-attention. Without, it is plain
    Llama-3.2-Vision. Keys of our own exports (`tokens_before_first_frame`, `full_attention`,
    `cross_attention_rope`) say it exactly; without them tokens that see no frame attend all, as in
    the published code.

    Args:
        source: config.json, the folder that holds it, or what was read from it.
        arch: `moss` also where no key says so (pooling is then what ProjectorConfig has), `mllama`
            to insist on plain Llama; None: as the keys say.
        dtype: fp32 | bf16 in place of what the file says.

    Raises:
        ConfigError: a key is missing, of a wrong type, or asks for what the model cannot do; each
            line names the file and the key.
    """
    root = _read(source)
    _check_kind(root)
    vision = root.section("vision_config", "vision")
    text = root.section("text_config", "text")
    pool = _pool(root, vision)
    if arch == "mllama" and pool.pool != "none":
        raise root.error("pool_mode", pool.pool, "absent: with pooling it is not plain Llama")
    if arch == "moss" and pool.pool == "none" and not root.has("pool_mode"):
        pool = ProjectorConfig()
    moss = pool.pool != "none"
    image_token = root.integer("image_token_index", "image_token_id")
    rows = text.integer("vocab_size") + EXTRA_EMBEDDING_ROWS
    if not 0 <= image_token < rows:
        raise root.error("image_token_index", image_token, f"below the embedding's {rows} rows")
    if root.has("blind_rows"):
        raise ConfigError([f"{root.file}: blind_rows is called tokens_before_first_frame now"])
    return ModelConfig(
        name=root.name,
        vision=_vision(vision, full_attention=root.flag("full_attention", moss)),
        projector=pool,
        text=_text(text),
        tokens_before_first_frame=root.choice("tokens_before_first_frame", ("attend_all", "zero")),
        cross_attention_rope=root.flag("cross_attention_rope", moss),
        dtype=dtype or _dtype(root, text),
    )


def kind_of(source: str | Path | Mapping[str, Any]) -> str:
    """The kind of a config.json: `vision` (Mllama, MOSS-Video) or `text` (a text-only Llama).

    Raises:
        ConfigError: it describes something else.
    """
    return _check_kind(_read(source))


def _check_kind(root: _Section) -> str:
    kind = root.values.get("model_type")
    if kind == "llama":
        return "text"
    if kind in ("mllama", "moss_video") or (
        kind is None and any(root.has(key) for key in ("vision_config", "vision"))
    ):
        return "vision"
    made = root.values.get("architectures") or kind
    raise ConfigError(
        [
            f"{root.file}: is of {made}: only Llama-3.2-Vision (mllama), MOSS-Video (moss_video) "
            "and text-only Llama (llama) can be converted"
        ]
    )


def text_config_from_llama(source: str | Path | Mapping[str, Any], into: TextConfig) -> TextConfig:
    """`into`, with all that a text-only Llama's config.json says: its layers are counted without
    the cross-attention layers of `into`.

    Raises:
        ConfigError: as `model_config_from_hf`.
    """
    root = _read(source)
    root.expect("hidden_act", "silu")
    for key in ("attention_bias", "mlp_bias"):
        root.expect(key, False)
    heads, hidden = root.integer("num_attention_heads"), root.integer("hidden_size")
    root.expect("head_dim", hidden // heads)
    theta, scaling = _rope(root)
    return replace(
        into,
        vocab_size=root.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=root.integer("num_hidden_layers") + len(into.cross_attention_layers),
        num_heads=heads,
        num_kv_heads=root.integer("num_key_value_heads"),
        mlp_size=root.integer("intermediate_size"),
        norm_eps=root.number("rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
    )


class _Section:
    """A mapping of the file that knows where it stands, for the sake of its errors."""

    def __init__(self, values: Mapping[str, Any], file: str, path: str = "", name: str = ""):
        self.values, self.file, self.path, self.name = values, file, path, name

    def error(self, key: str, value: Any, allowed: str) -> ConfigError:
        """An error that names the file and the key."""
        return ConfigError([f"{self.file}: {self.path}{key} is {value!r}, it must be {allowed}"])

    def find(self, *keys: str) -> tuple[str, Any]:
        """The first of `keys` (a key and its other names) that is there, and its value."""
        for key in keys:
            if self.values.get(key) is not None:
                return key, self.values[key]
        raise ConfigError([f"{self.file}: {self.path}{keys[0]} is missing"])

    def has(self, key: str) -> bool:
        """True where `key` has a value."""
        return self.values.get(key) is not None

    def integer(self, *keys: str) -> int:
        """A positive whole number (or 0)."""
        key, value = self.find(*keys)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(key, value, "a whole number")
        return value

    def number(self, *keys: str) -> float:
        """A number."""
        key, value = self.find(*keys)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, value, "a number")
        return float(value)

    def integers(self, key: str) -> list[int]:
        """A list of whole numbers."""
        _, value = self.find(key)
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self.error(key, value, "a list of whole numbers")
        return list(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false, `default` where nothing is said."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return default if value is None else value

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        """One of `allowed`, the first where nothing is said."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            raise self.error(key, value, f"one of {', '.join(allowed)}")
        return allowed[0] if value is None else value

    def section(self, *keys: str) -> _Section:
        """A mapping inside this one."""
        key, value = self.find(*keys)
        if not isinstance(value, Mapping):
            raise self.error(key, value, "a mapping")
        return _Section(value, self.file, f"{self.path}{key}.")

    def expect(self, key: str, wanted: Any) -> None:
        """Refuses another value than the one that the model is written for."""
        value = self.values.get(key)
        if value is not None and value != wanted:
            raise self.error(key, value, repr(wanted))


def _read(source: str | Path | Mapping[str, Any]) -> _Section:
    if isinstance(source, Mapping):
        return _Section(source, "config", name="imported")
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    except ValueError as error:
        raise ConfigError([f"{path}: is not JSON: {error}"]) from None
    if not isinstance(values, dict):
        raise ConfigError([f"{path}: holds no mapping"])
    return _Section(values, str(path), name=path.absolute().parent.name)


def _vision(section: _Section, full_attention: bool) -> VisionConfig:
    section.expect("hidden_act", "gelu")
    section.expect("num_channels", 3)
    vision = VisionConfig(
        hidden_size=section.integer("hidden_size"),
        num_layers=section.integer("num_hidden_layers"),
        num_global_layers=section.integer("num_global_layers"),
        num_heads=section.integer("attention_heads", "num_attention_heads"),
        mlp_size=section.integer("intermediate_size"),
        image_size=section.integer("image_size"),
        patch_size=section.integer("patch_size"),
        max_tiles=section.integer("max_num_tiles"),
        intermediate_layers=section.integers("intermediate_layers_indices"),
        norm_eps=section.number("norm_eps"),
        full_attention=full_attention,
    )
    section.expect("vision_output_dim", vision.output_size)
    ratios = [list(grid) for grid in supported_aspect_ratios(vision.max_tiles)]
    section.expect("supported_aspect_ratios", ratios)  # their order gives aspect_ratio_ids
    return vision


def _text(section: _Section) -> TextConfig:
    section.expect("hidden_act", "silu")
    section.expect("tie_word_embeddings", False)
    theta, scaling = _rope(section)
    return TextConfig(
        vocab_size=section.integer("vocab_size"),
        extra_embedding_rows=EXTRA_EMBEDDING_ROWS,
        hidden_size=section.integer("hidden_size"),
        num_layers=section.integer("num_hidden_layers"),
        cross_attention_layers=section.integers("cross_attention_layers"),
        num_heads=section.integer("num_attention_heads"),
        num_kv_heads=section.integer("num_key_value_heads"),
        mlp_size=section.integer("intermediate_size"),
        norm_eps=section.number("rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
    )


def _rope(section: _Section) -> tuple[float, RopeScalingConfig]:
    """transformers 5 has all in `rope_parameters`; 4 has `rope_theta` beside `rope_scaling`."""
    if section.has("rope_parameters"):
        rope = section.section("rope_parameters")
        theta = (rope if rope.has("rope_theta") else section).number("rope_theta")
    else:
        theta = section.number("rope_theta")
        if not section.has("rope_scaling"):
            return theta, RopeScalingConfig(factor=1.0)
        rope = section.section("rope_scaling")
    key, kind = rope.find("rope_type", "type")
    if kind == "default":
        return theta, RopeScalingConfig(factor=1.0)
    if kind != "llama3":
        raise rope.error(key, kind, "'llama3' or 'default'")
    return theta, RopeScalingConfig(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position=rope.integer("original_max_position_embeddings"),
    )


def _pool(root: _Section, vision: _Section) -> ProjectorConfig:
    for section in (root, vision):
        if section.has("pool"):
            return _pool_of(section.section("pool"), "mode", "stride")
        if section.has("pool_mode") or section.has("pool_stride"):
            return _pool_of(section, "pool_mode", "pool_stride")
    return ProjectorConfig(pool="none", stride=1)


def _pool_of(section: _Section, mode_key: str, stride_key: str) -> ProjectorConfig:
    _, mode = section.find(mode_key)
    if mode == "none":
        return ProjectorConfig(pool="none", stride=1)
    if mode not in POOLS:
        raise section.error(mode_key, mode, f"one of {', '.join(POOLS)}")
    return ProjectorConfig(pool=mode, stride=section.integer(stride_key))


def _dtype(root: _Section, text: _Section) -> str:
    """transformers takes a checkpoint that names no dtype for fp32."""
    for section in (root, text):
        for key in ("dtype", "torch_dtype"):
            if section.has(key):
                value = str(section.values[key])
                if value not in HF_DTYPES:
                    raise section.error(key, value, " or ".join(HF_DTYPES))
                return HF_DTYPES[value]
    return "fp32"
