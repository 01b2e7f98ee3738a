"""The small files beside a source's weights: do tokenizer, configs and image processor agree?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data_pipeline.images import IMAGE_MEAN, IMAGE_STD
from data_pipeline.tokens import SpecialTokens, load_tokenizer, token_text
from moss_train.convert.source import ConversionError, read_json
from moss_train.model_config import ModelConfig

# Tokens that config.json and the tokenizer must agree about: what the model takes for a frame, and
# which labels weigh less.
MEANING = {"image": ("image_token_index", "image_token_id"), "video": ("video_token_id",)}
MEANING["silence"] = ("silence_token_id",)
ENDS = {  # those that only say where texts begin and end
    "bos_token_id": "begin_of_text",
    "eos_token_id": "end_of_text",
    "pad_token_id": "finetune_right_pad_id",
}
# Ids of tokens that generation_config.json may name besides.
RULED = (
    "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens",
    "begin_suppress_tokens",
)  # fmt: skip
# What transformers' Mllama processor has where its file says nothing.
PROCESSOR_DEFAULTS: dict[str, Any] = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "size": {"height": 224, "width": 224},
    "max_image_tiles": 4,
}
# How an added token is found in a text; the last counts where a tokenizer normalizes texts.
RULES = ("lstrip", "rstrip", "single_word", "normalized")
ON = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize", "do_pad")


@dataclass
class Beside:
    """What the files beside the weights say.

    max_tiles: tiles of a picture; None: no file says it. notes: lines for a reader.
    """

    max_tiles: int | None = None
    notes: list[str] = field(default_factory=list)


def read_beside(source: Path, model: ModelConfig) -> Beside:
    """Reads and checks them.

    Raises:
        ConversionError: they say two things, or what the model is not written for. A line for
            each, with both values.
    """
    text = model.text
    rows = text.vocab_size + text.extra_embedding_rows
    beside, problems = Beside(), []
    if (source / "tokenizer.json").is_file():
        tokenizer = read_tokenizer(source / "tokenizer.json")
        if tokenizer.get_vocab_size() > rows:
            problems.append(
                f"{source / 'tokenizer.json'}: has {tokenizer.get_vocab_size()} tokens, the "
                f"embedding has {rows} rows: give the tokenizer that the model was trained with"
            )
        problems += _added_tokens(source, tokenizer)
        problems += _meanings(source, tokenizer)
        beside.notes += [*_ends(source, tokenizer), *missing_tokens(tokenizer)]
        beside.notes += _named_tokens(source, tokenizer)
    problems += _no_ids(source)
    beside.notes += _out_of_range(source, rows)
    found = _preprocessors(source)
    problems += _differing(found)
    for path, values in list(found.items())[:1]:
        problems += [f"{path}: {line}" for line in _pixels(values, model)]
        beside.notes += [f"{path}: {line}" for line in _other_processor(values)]
        beside.max_tiles = values["max_image_tiles"]
    templates = chat_templates(source)
    if templates and read_json(source / "config.json").get("model_type") != "moss_video":
        beside.notes.append(
            f"chat template: that of {', '.join(templates)} is not taken: training, inference and "
            "exports write Llama 3's headers without additions"
        )
    if problems:
        raise ConversionError("\n".join(problems))
    return beside


def read_tokenizer(path: Path) -> Tokenizer:
    """A folder's tokenizer, or that of a tokenizer.json; ConversionError."""
    try:
        return load_tokenizer(path)
    except ValueError as error:
        raise ConversionError(str(error)) from None


def missing_tokens(tokenizer: Tokenizer) -> Iterator[str]:
    """A line where a tokenizer lacks tokens that training needs."""
    try:
        SpecialTokens.from_tokenizer(tokenizer, "tokenizer:")
    except ValueError as error:
        yield f"{error}; training refuses it, and an export takes no pictures without <|image|>"


def same_special_tokens(other: Path, own: Path) -> list[str]:
    """A line for each special token that two tokenizers have under other ids."""
    theirs, ours = read_tokenizer(other), read_tokenizer(own)
    lines = []
    for name in SpecialTokens.__dataclass_fields__:
        token = token_text(name)
        ids = (theirs.token_to_id(token), ours.token_to_id(token))
        if ids[0] != ids[1] and ids[1] is not None:
            lines.append(f"{other}: {token} is {ids[0]}, in the run's tokenizer ({own}) {ids[1]}")
    return lines


def chat_templates(folder: Path) -> list[str]:
    """Names of the files of a folder that hold a chat template."""
    places = []
    for name in ("tokenizer_config.json", "chat_template.json", "processor_config.json"):
        path = folder / name
        if path.is_file() and read_json(path).get("chat_template"):
            places.append(name)
    if (folder / "chat_template.jinja").is_file():
        places.append("chat_template.jinja")
    more = folder / "additional_chat_templates"
    return places + [f"{more.name}/{path.name}" for path in sorted(more.glob("*.jinja"))]


def _configs(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping that may name special tokens, and how it is called."""
    for file in ("config.json", "generation_config.json"):
        if (source / file).is_file():
            values = read_json(source / file)
            yield f"{source / file}: ", values
            for key in ("text_config", "text"):
                if isinstance(values.get(key), dict):
                    yield f"{source / file}: {key}.", values[key]


def _ids(value: Any) -> list[int]:
    """Ids of a token that may have several, or none (null, -1)."""
    values = value if isinstance(value, list) else [value]
    return [token for token in values if type(token) is int and token >= 0]


def _added_tokens(source: Path, tokenizer: Tokenizer) -> Iterator[str]:
    """Tokens that transformers finds beside tokenizer.json, and training does not."""
    added_tokens: dict[str, int] = {}
    rules: dict[str, dict[str, Any]] = {}
    if (source / "added_tokens.json").is_file():
        added_tokens |= read_json(source / "added_tokens.json")
    if (source / "tokenizer_config.json").is_file():
        path = source / "tokenizer_config.json"
        added = read_json(path).get("added_tokens_decoder") or {}
        try:
            added_tokens |= {str(token["content"]): int(number) for number, token in added.items()}
            rules = {str(token["content"]): dict(token) for token in added.values()}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ConversionError(
                f"{path}: added_tokens_decoder does not map ids to tokens, as transformers writes "
                f"it: {_ANEW}"
            ) from None
    differing = [
        f"{token} is {number} ({tokenizer.token_to_id(token)})"
        for token, number in added_tokens.items()
        if tokenizer.token_to_id(token) != number
    ]
    for own in tokenizer.get_added_tokens_decoder().values():
        for rule in RULES if tokenizer.normalizer is not None else RULES[:-1]:
            theirs, ours = rules.get(own.content, {}).get(rule), getattr(own, rule)
            if theirs not in (None, ours):
                differing.append(f"{own.content} has {rule}={theirs} ({ours})")
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        yield (
            f"{source}: {', '.join(differing[:3])}{more} beside tokenizer.json (in brackets what "
            f"that says), which alone is read: {_ANEW}"
        )


def _named_tokens(source: Path, tokenizer: Tokenizer) -> Iterator[str]:
    """A line where transformers adds a token to the tokenizer because a setting names it."""
    path = source / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    for key, value in settings.items():
        for text in _texts(value) if key.endswith(("_token", "_special_tokens")) else []:
            if tokenizer.token_to_id(text) is None:
                yield (
                    f"{path}: {key} names {text}, which tokenizer.json does not have: training "
                    "reads it as text, transformers as a new token"
                )


def _texts(value: Any) -> list[str]:
    """The texts of a setting: of a token, or of several in a list or by name."""
    if isinstance(value, dict):
        value = value["content"] if "content" in value else list(value.values())
    if isinstance(value, list):
        return [text for one in value for text in _texts(one)]
    return [value] if isinstance(value, str) else []


def tokenizer_settings(values: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json of an export: without a chat template, which would be a second one,
    and with the names of transformers 4, which transformers 5 reads as well."""
    kept = {key: value for key, value in values.items() if key != "chat_template"}
    if kept.get("tokenizer_class") == "TokenizersBackend":
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(kept.get("extra_special_tokens"), list):
        kept["additional_special_tokens"] = kept.pop("extra_special_tokens")
    return kept


def _meanings(source: Path, tokenizer: Tokenizer) -> Iterator[str]:
    for place, values in _configs(source):
        for name, keys in MEANING.items():
            token = tokenizer.token_to_id(token_text(name))
            for key in keys:
                token_there = values.get(key)
                if None not in (token_there, token) and token_there != token:
                    yield (
                        f"{place}{key} is {token_there}, but the tokenizer's {token_text(name)} is "
                        f"{token}: correct the one that the model was not trained with"
                    )


def _ends(source: Path, tokenizer: Tokenizer) -> Iterator[str]:
    path = source / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    for place, values in _configs(source):
        for key, name in ENDS.items():
            ids = _ids(values.get(key))
            ours = tokenizer.token_to_id(token_text(name))
            own = settings.get(key.removesuffix("_id"))
            own = own.get("content") if isinstance(own, dict) else own
            theirs = tokenizer.token_to_id(own) if isinstance(own, str) else None
            if ids and ours is not None and not {ours, theirs} & set(ids):
                yield (
                    f"{place}{key} is {values[key]}, the tokenizer's {token_text(name)} is {ours}: "
                    "an export has the tokenizer's in config.json"
                )


def _no_ids(source: Path) -> Iterator[str]:
    """A line for each setting that must be an id of a token, or several, and is something else."""
    for place, values in _configs(source):
        for key in (*ENDS, *RULED):
            value = values.get(key)
            ids = value if isinstance(value, list) else [value]
            if value is not None and not all(type(token) is int for token in ids):
                yield f"{place}{key} is {value!r}: it must be the id of a token, or a list of ids"


def _out_of_range(source: Path, rows: int) -> Iterator[str]:
    for place, values in _configs(source):
        for key in (*ENDS, *RULED):
            beyond = [token for token in _ids(values.get(key)) if token >= rows]
            if beyond:
                yield (
                    f"{place}{key} is {beyond[0]}, the embedding has {rows} rows: exports leave "
                    "it out"
                )


def _preprocessors(source: Path) -> dict[Path, dict[str, Any]]:
    """The files that say how pictures are prepared, the one that transformers 5 reads first: its
    own processor_config.json, then transformers 4's."""
    found = {}
    path = source / "processor_config.json"
    nested = read_json(path).get("image_processor") if path.is_file() else None
    if isinstance(nested, dict):
        found[path] = PROCESSOR_DEFAULTS | nested
    path = source / "preprocessor_config.json"
    if path.is_file():
        found[path] = PROCESSOR_DEFAULTS | read_json(path)
    return found


def _differing(found: dict[Path, dict[str, Any]]) -> Iterator[str]:
    """A line for each setting that two files have otherwise."""
    if len(found) < 2:
        return
    (one, new), (other, old) = found.items()
    for key in (*PROCESSOR_DEFAULTS, *ON, "resample", "rescale_factor"):
        if not _same(new.get(key), old.get(key)):
            yield (
                f"{one}: image_processor.{key} is {new[key]}, in {other.name} {old[key]}: remove "
                "the one that the model was not trained with"
            )


def _same(one: Any, other: Any) -> bool:
    """Whether two settings mean the same: one that is not given, numbers that were fp32 once."""
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return all(map(_same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one is None or other is None or one == other


def _pixels(values: dict[str, Any], model: ModelConfig) -> Iterator[str]:
    """What training and exports do otherwise than a source's image processor."""
    side = model.vision.image_size
    size = values["size"]
    if isinstance(size, int):
        size = {"height": size, "width": size}
    if size != {"height": side, "width": side}:
        yield f"size is {size}, vision_config.image_size is {side}: they must be the same"
    for key, expected in (("image_mean", IMAGE_MEAN), ("image_std", IMAGE_STD)):
        value = values[key]
        alike = isinstance(value, list) and len(value) == len(expected)
        if not alike or not all(map(_near, value, expected)):
            yield f"{key} is {value}, training and exports have {list(expected)}: {_RETRAIN}"
    for key in ON:
        if values.get(key) is False:
            yield f"{key} is false, training and exports have true: {_RETRAIN}"
    if values.get("do_center_crop"):
        yield f"do_center_crop is true, training and exports do not crop: {_RETRAIN}"
    if values.get("resample", 2) != 2:
        yield f"resample is {values['resample']}, training and exports have 2: {_RETRAIN}"
    factor = values.get("rescale_factor", 1 / 255)
    if not _near(factor, 1 / 255, 1e-6):
        yield f"rescale_factor is {factor}, training and exports have 1 / 255: {_RETRAIN}"
    tiles, most = values["max_image_tiles"], model.vision.max_tiles
    if type(tiles) is not int or not 1 <= tiles <= most:
        yield (
            f"max_image_tiles is {tiles}, it must be a whole number of 1 to {most} "
            "(vision_config.max_num_tiles)"
        )


def _near(value: Any, expected: float, tolerance: float = 1e-4) -> bool:
    """Whether a setting is a number, and this one."""
    return type(value) in (int, float) and math.isclose(value, expected, abs_tol=tolerance)


def _other_processor(values: dict[str, Any]) -> Iterator[str]:
    """A line where the file is of another class, which reads other settings than Mllama's."""
    kind = values.get("image_processor_type")
    if isinstance(kind, str) and not kind.startswith("MllamaImageProcessor"):
        yield (
            f"image_processor_type is {kind}: training and exports cut pictures into tiles as "
            "MllamaImageProcessor does"
        )


_RETRAIN = "correct the file if the model was trained so, else it cannot be converted"
_ANEW = (
    "write it anew, with AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of "
    "transformers"
)
