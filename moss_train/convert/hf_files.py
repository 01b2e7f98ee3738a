"""The files of an export beside its weights: configs, tokenizer, code, and where it came from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from data_pipeline.aspect_ratios import supported_aspect_ratios
from data_pipeline.images import IMAGE_MEAN, IMAGE_STD
from data_pipeline.prompts import trained_form
from data_pipeline.tokenizer_identity import identify
from data_pipeline.tokens import token_text
from moss_train.checkpoint_dir import read_run
from moss_train.config import Config
from moss_train.convert.hf_config import EXTRA_EMBEDDING_ROWS
from moss_train.convert.quantize import Quantizer
from moss_train.convert.side_files import (
    ENDS,
    RULED,
    chat_templates,
    missing_tokens,
    read_tokenizer,
    same_special_tokens,
    tokenizer_settings,
)
from moss_train.convert.source import ConversionError, read_json
from moss_train.model_config import ModelConfig
from moss_train.trained_tokenizer import KEY, check_tokenizer

TRAINING = "training.json"  # the run that made the weights
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SOURCE = "source"  # folder of an imported checkpoint: small files of where it came from
SOURCE_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
IMPORTED = "imported"  # stage of weights whose training is not known
MOSS_CLASS, PLAIN_CLASS = "MossVideoForConditionalGeneration", "MllamaForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_moss_video.MossVideoConfig",
    "AutoModel": "model_moss_video.MossVideoModel",
    "AutoModelForImageTextToText": f"modeling_moss_video.{MOSS_CLASS}",
    "AutoModelForMultimodalLM": f"modeling_moss_video.{MOSS_CLASS}",
    "AutoModelForCausalLM": f"modeling_moss_video.{MOSS_CLASS}",
}


def check_plain(model: ModelConfig, checkpoint: Path) -> None:
    """Raises ConversionError with everything in which a model is not plain Llama-3.2-Vision."""
    differences = {
        "projector.pool": (model.projector.pool, "none"),
        "vision.full_attention": (model.vision.full_attention, False),
        "cross_attention_rope": (model.cross_attention_rope, False),
        "tokens_before_first_frame": (model.tokens_before_first_frame, "attend_all"),
    }
    uses = [
        f"model.{name}={have} ({want})"
        for name, (have, want) in differences.items()
        if have != want
    ]
    if uses:
        raise ConversionError(
            f"{checkpoint}: cannot be a plain Mllama (--target mllama), for it uses what only "
            f"MOSS-Video has: {', '.join(uses)}; in brackets what Mllama has. Export it as moss"
        )


@dataclass
class HfFiles:
    """What the files of an export are made from."""

    config: Config
    run: dict[str, Any]  # the checkpoint's run.json
    target: str  # moss | mllama
    named_stage: str | None  # stage that the user names in place of the run's
    tokenizer: Path | None  # folder
    source: Path  # folder of `SOURCE_FILES`, which need not exist
    code: Path  # folder of the model's files

    @classmethod
    def of(
        cls,
        checkpoint: Path,
        config: Config,
        target: str,
        stage: str | None,
        tokenizer: Path | None,
        code: Path,
    ) -> HfFiles:
        """Raises ConversionError: there is no tokenizer where one is named, or it is too large."""
        folder = _tokenizer_folder(checkpoint, config, tokenizer)
        source = checkpoint / SOURCE
        files = cls(config, read_run(checkpoint), target, stage, folder, source, code)
        files.check_tokenizer()
        if folder is not None:
            mend = "give the one that it was trained with (--tokenizer)"
            check_tokenizer(files.run, checkpoint, folder, f"tokenizer {folder}", mend)
        own_tokenizer = _tokenizer_folder(checkpoint, config, None)
        if tokenizer is not None and own_tokenizer is not None:
            differing = same_special_tokens(tokenizer, own_tokenizer)
            if differing:
                raise ConversionError("\n".join(differing))
        return files

    def check_tokenizer(self) -> None:
        """Every token must have a row in the embedding."""
        if self.tokenizer is None:
            return
        count = read_tokenizer(self.tokenizer).get_vocab_size()
        rows = self.config.model.text.vocab_size + EXTRA_EMBEDDING_ROWS
        if count > rows:
            raise ConversionError(
                f"{self.tokenizer}: has {count} tokens, transformers gives the embedding {rows} "
                f"rows (model.text.vocab_size + {EXTRA_EMBEDDING_ROWS}): give the tokenizer that "
                "the model was trained with (--tokenizer)"
            )

    @property
    def prompt_form(self) -> str | None:
        """The form of the prompts that the weights were trained with, from which inference knows
        what the model is for; None: unknown."""
        return trained_form(self._own, self.config.stage.prompt, self.named_stage)

    @property
    def stage(self) -> str | None:
        """The stage that made the weights; None: unknown."""
        return self.named_stage or self._own

    @property
    def _own(self) -> str | None:
        name = self.config.stage.name
        return None if name == IMPORTED else name

    @property
    def base(self) -> dict[str, Any]:
        """config.json of where the weights first came from; empty for our own."""
        path = self.source / "config.json"
        return read_json(path) if path.is_file() else {}


def write_files(
    folder: Path, files: HfFiles, dtypes: set[torch.dtype], quantizer: Quantizer | None
) -> list[str]:
    """Writes all files but the weights; returns lines for the user."""
    floats = [dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1]
    dtype = min(floats, key=lambda kind: kind.itemsize)
    tokenizer = read_tokenizer(files.tokenizer) if files.tokenizer is not None else None
    config = hf_config(files, tokenizer, str(dtype).removeprefix("torch."))
    if quantizer is not None:
        config["quantization_config"] = quantizer.config()
    _write(folder / "config.json", config)
    _write(folder / "generation_config.json", _generation(files, config["text_config"], tokenizer))
    _write(folder / "preprocessor_config.json", _image_processor(files))
    _write(folder / "processor_config.json", _processor(files))
    _write(folder / TRAINING, _training(files))
    lines = list(_templates(files))
    shutil.copyfile(files.code / "chat_template.jinja", folder / "chat_template.jinja")
    if files.target == "moss":
        for path in files.code.glob("*_moss_video.py"):
            shutil.copyfile(path, folder / path.name)
    if files.tokenizer is None:
        return [*lines, "tokenizer: none is known: put one into the folder, or give --tokenizer"]
    for name in TOKENIZER_FILES:
        if (files.tokenizer / name).is_file():
            shutil.copyfile(files.tokenizer / name, folder / name)
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        _write(settings, tokenizer_settings(read_json(settings)))
    assert tokenizer is not None
    lines += [*missing_tokens(tokenizer), f"tokenizer: {files.tokenizer}"]
    return [*lines, f"stage: {files.stage or 'unknown'}"]


def _templates(files: HfFiles) -> Iterator[str]:
    """A line where the source or the tokenizer's folder has a chat template of its own."""
    ours = (files.code / "chat_template.jinja").read_text().strip()
    for folder in dict.fromkeys((files.source, files.tokenizer or files.source)):
        same = folder / "chat_template.jinja"
        others = [
            name
            for name in chat_templates(folder)
            if name != same.name or same.read_text().strip() != ours
        ]
        if others:
            yield (
                f"chat template: that of training; the one of {folder} ({', '.join(others)}) is "
                "left out"
            )


def hf_config(files: HfFiles, tokenizer: Tokenizer | None, dtype: str) -> dict[str, Any]:
    """config.json. Its keys are Mllama's, and for MOSS-Video those of MossVideoConfig."""
    model, base = files.config.model, files.base
    plain = files.target == "mllama"
    config: dict[str, Any] = {
        "architectures": [PLAIN_CLASS if plain else MOSS_CLASS],
        "model_type": "mllama" if plain else "moss_video",
        "dtype": dtype,
        "image_token_index": _token(tokenizer, "image", base, model.text.vocab_size),
        "tie_word_embeddings": False,
        "vision_config": vision_section(model),
        "text_config": text_section(model, base, tokenizer),
    }
    if not plain:
        config |= {
            "auto_map": AUTO_MAP,
            "moss_stage": files.stage,
            "moss_prompt_form": files.prompt_form,
            "pool_mode": model.projector.pool,
            "pool_stride": model.projector.stride,
            "full_attention": model.vision.full_attention,
            "cross_attention_rope": model.cross_attention_rope,
            "tokens_before_first_frame": model.tokens_before_first_frame,
            "silence_token_id": _token(tokenizer, "silence", base),
            "silence_weight": files.config.stage.silence_weight,
            "video_token_id": _token(tokenizer, "video", base),
        }
    return config


def _token(
    tokenizer: Tokenizer | None, name: str, base: dict[str, Any], default: int | None = None
) -> int | None:
    """Id of a special token: the tokenizer's, else what the source says, else `default`."""
    token = None if tokenizer is None else tokenizer.token_to_id(token_text(name))
    for key in (f"{name}_token_id", f"{name}_token_index"):
        token = base.get(key) if token is None else token
    return default if token is None else token


def vision_section(model: ModelConfig) -> dict[str, Any]:
    """`vision_config` of config.json."""
    vision = model.vision
    return {
        "model_type": "mllama_vision_model",
        "hidden_size": vision.hidden_size,
        "hidden_act": "gelu",
        "num_hidden_layers": vision.num_layers,
        "num_global_layers": vision.num_global_layers,
        "attention_heads": vision.num_heads,
        "num_channels": 3,
        "intermediate_size": vision.mlp_size,
        "vision_output_dim": vision.output_size,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "norm_eps": vision.norm_eps,
        "max_num_tiles": vision.max_tiles,
        "intermediate_layers_indices": list(vision.intermediate_layers),
        "supported_aspect_ratios": [
            list(grid) for grid in supported_aspect_ratios(vision.max_tiles)
        ],
    }


def text_section(
    model: ModelConfig, base: dict[str, Any], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """`text_config` of config.json. `base`: that of the weights' first source, or empty."""
    text, theirs = model.text, base.get("text_config") or base.get("text") or base
    scaling = text.rope_scaling
    config = {
        "model_type": "mllama_text_model",
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "hidden_act": "silu",
        "num_hidden_layers": text.num_layers,
        "cross_attention_layers": list(text.cross_attention_layers),
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "intermediate_size": text.mlp_size,
        "rms_norm_eps": text.norm_eps,
        "rope_theta": text.rope_theta,
        "max_position_embeddings": theirs.get("max_position_embeddings", 131072),
        "tie_word_embeddings": False,
    }
    if scaling.factor != 1.0:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    for key, name in (
        ("bos_token_id", "begin_of_text"),
        ("eos_token_id", "end_of_text"),
        ("pad_token_id", "finetune_right_pad_id"),
    ):
        token = None if tokenizer is None else tokenizer.token_to_id(token_text(name))
        token = theirs.get(key, base.get(key)) if token is None else token
        if isinstance(token, list):  # Instruct models end with any of several
            token = token[0]
        rows = text.vocab_size + EXTRA_EMBEDDING_ROWS
        config[key] = token if token is not None and 0 <= token < rows else None
    return config


def _generation(
    files: HfFiles, text: dict[str, Any], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """A chat ends with `<|eot_id|>`, a text with `<|end_of_text|>`."""
    path = files.source / "generation_config.json"
    if path.is_file():
        values = read_json(path)
        if files.target == "moss":  # whose class takes transformers' dynamic cache alone
            values.pop("cache_implementation", None)
        return _in_range(values, files.config.model.text.vocab_size + EXTRA_EMBEDDING_ROWS)
    turn = None if tokenizer is None else tokenizer.token_to_id(token_text("eot_id"))
    ends = [token for token in (text["eos_token_id"], turn) if token is not None]
    ids = {
        "bos_token_id": text["bos_token_id"],
        "eos_token_id": ends or None,
        "pad_token_id": text["pad_token_id"],
    }
    return {key: value for key, value in ids.items() if value is not None}


def _in_range(values: dict[str, Any], rows: int) -> dict[str, Any]:
    """`values` without ids of tokens that have no row."""
    keys = (*ENDS, *RULED)
    for key in keys:
        ids = values.get(key)
        if isinstance(ids, list):
            values[key] = [token for token in ids if 0 <= token < rows] or None
        elif ids is not None and not 0 <= ids < rows:
            values[key] = None
    return {key: value for key, value in values.items() if value is not None or key not in keys}


def _image_processor(files: HfFiles) -> dict[str, Any]:
    """Tiles as training cuts them (data_pipeline/images.py)."""
    side, tiles = files.config.model.vision.image_size, files.config.data.max_tiles
    return {
        "image_processor_type": "MllamaImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
        "do_pad": True,
        "max_image_tiles": tiles,
    }


def _processor(files: HfFiles) -> dict[str, Any]:
    if files.target == "mllama":
        return {"processor_class": "MllamaProcessor"}
    stage = files.config.stage
    return {
        "processor_class": "MossVideoProcessor",
        "auto_map": {"AutoProcessor": "processing_moss_video.MossVideoProcessor"},
        "video_fps": stage.video_fps,
        "video_min_frames": stage.video_min_frames,
        "video_max_frames": stage.video_max_frames,
    }


def _training(files: HfFiles) -> dict[str, Any]:
    """The run, without what is of its machine alone."""
    config = json.loads(json.dumps(files.run["config"]))
    config["run"]["dir"] = config["data"]["tokenizer"] = ""
    config["data"]["sources"] = config["data"]["eval_sources"] = []
    config["init_from"] = None
    kept = {key: files.run.get(key) for key in ("step", "samples", "layout", "versions")}
    if files.tokenizer is not None:
        kept[KEY] = identify(files.tokenizer).to_dict()
    return {**kept, "config": config}


def _tokenizer_folder(checkpoint: Path, config: Config, option: Path | None) -> Path | None:
    named = Path(config.data.tokenizer) if config.data.tokenizer else None
    for folder in (option, checkpoint / "tokenizer", named):
        if folder is not None and (folder / "tokenizer.json").is_file():
            return folder
    if option is not None:
        raise ConversionError(f"{option}: has no tokenizer.json")
    return None


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")
