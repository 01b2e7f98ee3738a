"""A checkpoint's config.json (HF Mllama, or MOSS-Video's extension of it) -> ModelConfig."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.aspect_ratios import supported_aspect_ratios
from moss_train.config import ConfigError
from moss_train.convert.config_section import Section, read_section
from moss_train.convert.rope import rope_of
from moss_train.hardware import DTYPES
from moss_train.model_config import POOLS, ModelConfig, ProjectorConfig, TextConfig, VisionConfig

EXTRA_EMBEDDING_ROWS = 8  # transformers builds Mllama's embedding with vocab_size + 8 rows
# Our names of dtypes by transformers' names, which are torch's.
HF_DTYPES = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
# What transformers' LlamaConfig has where config.json (of Llama 1 and 2) says nothing.
LLAMA_THETA, LLAMA_EPS, MLLAMA_THETA = 10000.0, 1e-6, 500000.0
# transformers 4 saves of Mllama's sections what is not as in its own classes, which have these.
VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1280, "num_hidden_layers": 32, "num_global_layers": 8, "attention_heads": 16,
    "intermediate_size": 5120, "image_size": 448, "patch_size": 14, "norm_eps": 1e-5,
    "max_num_tiles": 4, "intermediate_layers_indices": [3, 7, 15, 23, 30],
}  # fmt: skip
TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "rms_norm_eps": 1e-5,
    "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
}  # fmt: skip
ARCHITECTURES = ("moss", "mllama")
FIRST_FRAME = ("tokens_before_first_frame", "blind_rows")  # today's name, and that of older exports


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
    root = read_section(source)
    _check_kind(root)
    vision = root.section("vision_config", "vision")
    text = root.section("text_config", "text")
    theta = None
    if root.has("transformers_version") and root.values.get("model_type") == "mllama":
        vision, text = vision.with_defaults(VISION_DEFAULTS), text.with_defaults(TEXT_DEFAULTS)
        theta = MLLAMA_THETA
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
    return ModelConfig(
        name=root.name,
        vision=_vision(vision, full_attention=root.flag("full_attention", moss)),
        projector=pool,
        text=_text(text, theta),
        tokens_before_first_frame=root.choice(FIRST_FRAME, ("attend_all", "zero")),
        cross_attention_rope=root.flag("cross_attention_rope", moss),
        dtype=dtype or _dtype(root, text),
    )


def kind_of(source: str | Path | Mapping[str, Any]) -> str:
    """The kind of a config.json: `vision` (Mllama, MOSS-Video) or `text` (a text-only Llama).

    Raises:
        ConfigError: it describes something else.
    """
    return _check_kind(read_section(source))


def ties_embeddings(source: str | Path | Mapping[str, Any]) -> bool:
    """True where a text-only Llama's output head is its embedding; without a word it is not."""
    return read_section(source).flag("tie_word_embeddings", False)


def _check_kind(root: Section) -> str:
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
    root = read_section(source)
    root.expect("hidden_act", "silu")
    for key in ("attention_bias", "mlp_bias"):
        root.expect(key, False)
    heads, hidden = root.integer("num_attention_heads"), root.integer("hidden_size")
    if heads == 0 or hidden % heads:
        raise root.error("num_attention_heads", heads, f"a divisor of hidden_size ({hidden})")
    root.expect("head_dim", hidden // heads)
    root.expect("partial_rotary_factor", 1.0)
    theta, scaling = rope_of(root, LLAMA_THETA)
    grouped = root.has("num_key_value_heads")
    return replace(
        into,
        vocab_size=root.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=root.integer("num_hidden_layers") + len(into.cross_attention_layers),
        num_heads=heads,
        num_kv_heads=root.integer("num_key_value_heads") if grouped else heads,
        mlp_size=root.integer("intermediate_size"),
        norm_eps=root.number("rms_norm_eps") if root.has("rms_norm_eps") else LLAMA_EPS,
        rope_theta=theta,
        rope_scaling=scaling,
    )


def _vision(section: Section, full_attention: bool) -> VisionConfig:
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


def _text(section: Section, theta: float | None) -> TextConfig:
    section.expect("hidden_act", "silu")
    section.expect("tie_word_embeddings", False)
    heads, hidden = section.integer("num_attention_heads"), section.integer("hidden_size")
    if heads and hidden % heads == 0:  # else told with the other sizes
        section.expect("head_dim", hidden // heads)
    section.expect("partial_rotary_factor", 1.0)
    theta, scaling = rope_of(section, theta)
    return TextConfig(
        vocab_size=section.integer("vocab_size"),
        extra_embedding_rows=EXTRA_EMBEDDING_ROWS,
        hidden_size=hidden,
        num_layers=section.integer("num_hidden_layers"),
        cross_attention_layers=section.integers("cross_attention_layers"),
        num_heads=heads,
        num_kv_heads=section.integer("num_key_value_heads"),
        mlp_size=section.integer("intermediate_size"),
        norm_eps=section.number("rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
    )


def _pool(root: Section, vision: Section) -> ProjectorConfig:
    for section in (root, vision):
        if section.has("pool"):
            return _pool_of(section.section("pool"), "mode", "stride")
        if section.has("pool_mode") or section.has("pool_stride"):
            return _pool_of(section, "pool_mode", "pool_stride")
    return ProjectorConfig(pool="none", stride=1)


def _pool_of(section: Section, mode_key: str, stride_key: str) -> ProjectorConfig:
    _, mode = section.find(mode_key)
    if mode == "none":
        return ProjectorConfig(pool="none", stride=1)
    if mode not in POOLS:
        raise section.error(mode_key, mode, f"one of {', '.join(POOLS)}")
    return ProjectorConfig(pool=mode, stride=section.integer(stride_key))


def _dtype(root: Section, text: Section) -> str:
    """transformers takes a checkpoint that names no dtype for fp32."""
    for section in (root, text):
        for key in ("dtype", "torch_dtype"):
            if section.has(key):
                value = str(section.values[key])
                if value not in HF_DTYPES:
                    raise section.error(key, value, " or ".join(HF_DTYPES))
                return HF_DTYPES[value]
    return "fp32"
