"""Hugging Face -> megatron: a folder of safetensors becomes a checkpoint that `init_from` takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial, reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.fields import wrong_values
from data_pipeline.progress import Progress
from data_pipeline.prompts import STAGE_FORMS
from data_pipeline.tokenizer_identity import identify
from moss_train.checkpoint_dir import write_complete
from moss_train.config import Config, RunConfig, StageConfig, from_dict, to_dict
from moss_train.convert.folders import foreign_form
from moss_train.convert.hf_config import kind_of, model_config_from_hf, text_config_from_llama
from moss_train.convert.hf_files import (
    IMPORTED,
    SOURCE,
    SOURCE_FILES,
    TOKENIZER_FILES,
    TRAINING,
)
from moss_train.convert.job import (
    FiniteCheck,
    MemoryBudget,
    new_folder,
    run_workers,
    write_manifest,
)
from moss_train.convert.llama import grown_reader, open_llama, text_shapes
from moss_train.convert.megatron_files import (
    Box,
    boxes_of_rows,
    write_boxes,
    write_extra_states,
    write_metadata,
)
from moss_train.convert.random_init import random_reader
from moss_train.convert.rope import saved_rope
from moss_train.convert.side_files import read_beside
from moss_train.convert.source import ConversionError, HfFolder, problems_of, read_json
from moss_train.data_config import DataConfig
from moss_train.hardware import DTYPES
from moss_train.model.hf_mapping import (
    TEXT,
    Rule,
    hf_shapes,
    normalize_name,
    our_shape,
    table,
    to_ours,
)
from moss_train.model_config import ModelConfig
from moss_train.model_sizes import unfit_sizes
from moss_train.trained_tokenizer import KEY, check_tokenizer

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_BOX = 256 * 2**20  # bytes: what a rank must read at once to get a part of it
EMBEDDING = f"{TEXT}embed_tokens.weight"


@dataclass
class FromHf:
    """Options of `convert_hf`; see tools/convert_checkpoint.py."""

    source: Path
    out: Path
    arch: str | None = None
    dtype: str | None = None  # fp32 | bf16; None: as stored
    stage: str | None = None
    grow_into: ModelConfig | None = None  # of a text-only Llama: all but the text model's sizes
    tensor_parallel: int = 1  # ranks that are to share the embedding's rows evenly
    seed: int = 1234
    check_finite: bool = False
    allow_pickle: bool = False
    workers: int = 2


Read = Callable[[str, torch.Size, slice], Tensor]


def convert_hf(options: FromHf) -> list[str]:
    """Writes the checkpoint `options.out`; returns lines about what was made.

    Raises:
        ConversionError, ConfigError: the source is not sound, or not what can be converted. Nothing
            is left at `out`.
    """
    source = options.source
    if not (source / "config.json").is_file():
        form = foreign_form(source) or "has no config.json: give a folder in Hugging Face's form"
        raise ConversionError(f"{source}: {form}")
    opened = _text_source(options) if kind_of(source) == "text" else _vision_source(options)
    model, folder, read = opened
    beside = read_beside(source, model)
    _check_tokenizer(source)
    folder.notes += [*saved_rope(folder, model.text), *beside.notes, *_not_quantized(source)]
    dtype = DTYPES[options.dtype] if options.dtype else None
    if options.dtype or len(folder.dtypes) == 1:
        model = replace(model, dtype=options.dtype or DTYPE_NAMES[next(iter(folder.dtypes))])
    finite = FiniteCheck(options.check_finite)
    stored = {name: dtype or tensor.dtype for name, tensor in folder.tensors.items()}
    default = DTYPES[model.dtype]

    def cast(name: str, shape: torch.Size, rows: slice) -> Tensor:
        tensor = read(name, shape, rows).to(stored.get(name, default))
        finite.add(name, tensor)
        return tensor

    boxes = [box for rule in table(model) for box in _boxes(model, rule, cast, stored, default)]
    size = sum(box.bytes for box in boxes)
    with new_folder(options.out, size) as unfinished:
        progress = Progress(f"{source} -> {options.out}", size, "GB", scale=1e9)
        hashes = _write(unfinished, model, boxes, options.workers, progress.step)
        finite.finish(source)
        lines = _describe(unfinished, options, model, beside.max_tiles)
        facts = {"source": str(source), "tensors": len(folder.tensors), "bytes": size}
        write_manifest(unfinished, hashes, facts)
        write_complete(unfinished)
    return [progress.summary(), *folder.notes, *lines]


def _vision_source(options: FromHf) -> tuple[ModelConfig, HfFolder, Read]:
    """Configuration, tensors and reader of a checkpoint of this architecture."""
    source = options.source
    folder = HfFolder(source, normalize_name, options.allow_pickle)
    _check_dtypes(folder, options)
    stored_as = DTYPE_NAMES.get(next(iter(folder.dtypes))) if len(folder.dtypes) == 1 else None
    model = model_config_from_hf(source, options.arch, options.dtype or stored_as)
    model = _fitted(model, folder)
    _check_sizes(f"{source}/config.json", model)
    _check_tensors(model, folder)
    return _divisible(model, options.tensor_parallel), folder, partial(_read_rows, folder)


def _text_source(options: FromHf) -> tuple[ModelConfig, HfFolder, Read]:
    """As `_vision_source`, for a text-only Llama: new cross-attention layers go between its own."""
    if options.arch == "mllama":
        raise ConversionError(f"{options.source}: is a text-only Llama, not mllama")
    into = options.grow_into or ModelConfig(tokens_before_first_frame="zero")
    model = replace(into, text=text_config_from_llama(options.source, into.text))
    _check_sizes(f"{options.source}/config.json in the sizes of --model (default: 11b)", model)
    model = _divisible(model, options.tensor_parallel)
    folder = open_llama(options.source, options.allow_pickle)
    _check_dtypes(folder, options)
    _compare(folder, text_shapes(model))
    return model, folder, grown_reader(folder.read, model, random_reader(model, options.seed))


def _fitted(model: ModelConfig, folder: HfFolder) -> ModelConfig:
    """`model`, with what only the tensors show: rows of the embedding, the merger's stride."""
    embedding, merger = folder.tensors.get(EMBEDDING), folder.tensors.get("patch_merger.weight")
    if embedding is not None and embedding.shape and embedding.shape[0] >= model.text.vocab_size:
        extra = embedding.shape[0] - model.text.vocab_size
        model = replace(model, text=replace(model.text, extra_embedding_rows=extra))
    if merger is not None and len(merger.shape) == 4:
        projector = replace(model.projector, pool="channel_fusion", stride=merger.shape[2])
        model = replace(model, projector=projector)
    return model


def _divisible(model: ModelConfig, ranks: int) -> ModelConfig:
    """`model`, with enough rows in the embedding that `ranks` tensor ranks share them evenly."""
    text = model.text
    missing = -(text.vocab_size + text.extra_embedding_rows) % ranks
    rows = text.extra_embedding_rows + missing
    return replace(model, text=replace(text, extra_embedding_rows=rows))


def _read_rows(folder: HfFolder, name: str, shape: torch.Size, rows: slice) -> Tensor:
    """Rows of a tensor; those that the folder does not have are zero."""
    stored = folder.tensors[name]
    if stored.shape == shape:
        return folder.read(name, rows)
    start, stop, _ = rows.indices(shape[0])
    out = torch.zeros(stop - start, *shape[1:], dtype=stored.dtype)
    if start < stored.shape[0]:
        there = folder.read(name, slice(start, min(stop, stored.shape[0])))
        out[: len(there)] = there
    return out


def _check_sizes(sizes: str, model: ModelConfig) -> None:
    """Raises ConversionError for a model that could be neither trained nor run. `sizes`: where its
    sizes come from."""
    problems = list(wrong_values(model, "model.")) or list(unfit_sizes(model))
    if problems:
        raise ConversionError("\n".join(f"{sizes}: makes {line}" for line in problems))


def _not_quantized(source: Path) -> Iterator[str]:
    """A line where weights that are whole have a note to quantize them."""
    if read_json(source / "config.json").get("quantization_config"):
        yield "quantization_config of config.json: is left out, for the weights are not quantized"


def _check_tensors(model: ModelConfig, folder: HfFolder) -> None:
    shapes: dict[str, torch.Size] = {}
    for rule in table(model):
        shapes |= hf_shapes(model, rule)
    _compare(folder, shapes)


def _compare(folder: HfFolder, shapes: dict[str, torch.Size]) -> None:
    """Raises ConversionError with a line for every tensor that is missing, surplus or misshapen."""
    problems = problems_of(folder, shapes)
    if problems:
        kind = str((read_json(folder.folder / "config.json").get("architectures") or [""])[0])
        if kind.endswith("Model"):
            raise ConversionError(
                f"{folder.folder}: is a {kind}, which has no output head: save the whole model "
                "(AutoModelForImageTextToText, AutoModelForCausalLM)"
            )
        lines = [f"{folder.folder}: its tensors are not those of its config.json", *problems]
        raise ConversionError("\n".join(lines))


def _check_dtypes(folder: HfFolder, options: FromHf) -> None:
    odd = {
        stored.dtype: stored.name
        for stored in folder.tensors.values()
        if stored.dtype not in DTYPE_NAMES
    }
    whole = [dtype for dtype in odd if not dtype.is_floating_point or dtype.itemsize == 1]
    if whole:
        raise ConversionError(
            f"{options.source}: {odd[whole[0]]} is {whole[0]}: quantized weights cannot be "
            "trained: convert what they were made of"
        )
    if odd and options.dtype is None:
        dtype, name = next(iter(odd.items()))
        raise ConversionError(f"{options.source}: {name} is {dtype}: give --dtype bf16 or fp32")


def _boxes(
    model: ModelConfig, rule: Rule, read: Read, stored: dict[str, torch.dtype], default: torch.dtype
) -> Iterator[Box]:
    """Our parameter in boxes, each made of the rows of HF tensors that it needs. It has one dtype,
    that of the most exact of them."""
    shapes = hf_shapes(model, rule)
    dtype = reduce(torch.promote_types, (stored.get(name, default) for name in shapes))
    if rule.kind == "heads":

        def fused() -> Tensor:
            tensors = [read(name, shape, slice(None)) for name, shape in shapes.items()]
            return to_ours(model, rule, tensors, 0, 1)

        shape = our_shape(model, rule)
        yield Box(rule.ours, (0,) * len(shape), tuple(shape), dtype, fused)
        return
    first = 0
    for name, shape in shapes.items():

        def rows(part: slice, name: str = name, shape: torch.Size = shape) -> Tensor:
            return read(name, shape, part).to(dtype)

        yield from boxes_of_rows(rule.ours, shape, dtype, rows, LARGEST_BOX, first)
        first += shape[0] if shape else 0


def _write(
    folder: Path,
    model: ModelConfig,
    boxes: list[Box],
    workers: int,
    on_bytes: Callable[[int], None],
) -> dict[str, str]:
    """Writes all boxes, a file for each worker; returns the files' hashes."""
    workers = max(1, min(workers, len(boxes)))
    parts: list[list[Box]] = [[] for _ in range(workers)]
    for box in sorted(boxes, key=lambda box: -box.bytes):  # even: the largest first
        min(parts, key=lambda part: sum(other.bytes for other in part)).append(box)
    whole: dict[str, int] = {}
    for box in boxes:
        whole[box.name] = whole.get(box.name, 0) + box.bytes
    memory = MemoryBudget(3 * max(whole.values()))

    def write(number: int) -> tuple[dict, str]:
        return write_boxes(folder / f"__0_{number}.distcp", parts[number], memory, on_bytes)

    written = run_workers(range(workers), write, workers)
    layers = list(_linear_layers(model))
    written.append(write_extra_states(folder / f"__0_{workers}.distcp", layers))
    places = {index: place for part, _ in written for index, place in part.items()}
    shapes = {rule.ours: our_shape(model, rule) for rule in table(model)}
    write_metadata(folder, shapes, boxes, layers, places)
    return {f"__0_{number}.distcp": digest for number, (_, digest) in enumerate(written)}


def _linear_layers(model: ModelConfig) -> Iterator[str]:
    """The layers that are megatron's linear ones."""
    for rule in table(model):
        name = rule.ours.removesuffix(".weight")
        linear = "linear_" in name.rpartition(".")[2] or name == "decoder.output"
        if rule.ours.endswith(".weight") and linear:
            yield name


def _describe(
    folder: Path, options: FromHf, model: ModelConfig, max_tiles: int | None
) -> list[str]:
    """run.json, tokenizer/ and what an export needs from the source."""
    lines = []
    tokenizer = [name for name in TOKENIZER_FILES if (options.source / name).is_file()]
    if "tokenizer.json" in tokenizer:
        _copy(options.source, folder / "tokenizer", tokenizer)
        lines.append(f"tokenizer: {options.out / 'tokenizer'}")
    else:
        lines.append(
            f"tokenizer: none, for {options.source} has no tokenizer.json: give data.tokenizer to "
            "training, and --tokenizer to an export"
        )
    _copy(options.source, folder / SOURCE, SOURCE_FILES)
    config = _run_config(options, model)
    config.data.max_tiles = max_tiles or config.data.max_tiles
    if "tokenizer.json" in tokenizer:
        config.data.tokenizer = str((options.out / "tokenizer").absolute())
    run = {
        "step": 0,
        "samples": 0,
        "layout": {"world": 1, "tensor": 1, "pipeline": 1, "virtual": 1},
        "versions": {"torch": version("torch")},
        "weights_only": True,
        "config": to_dict(config),
    }
    if "tokenizer.json" in tokenizer:
        run[KEY] = identify(folder / "tokenizer").to_dict()
    (folder / "run.json").write_text(json.dumps(run, indent=1))
    return lines


def _check_tokenizer(source: Path) -> None:
    """An export of ours says the tokenizer that its weights were trained with."""
    training = source / TRAINING
    run = read_json(training) if training.is_file() else {}
    if KEY in run and (source / "tokenizer.json").is_file():
        mend = f"put back the export's, or remove {KEY!r} from {training} if they were trained on"
        check_tokenizer(run, source, source, str(source / "tokenizer.json"), mend)


def _run_config(options: FromHf, model: ModelConfig) -> Config:
    """The configuration of the run that made the weights of an export of ours; else defaults."""
    training, hf = options.source / TRAINING, read_json(options.source / "config.json")
    if training.is_file():
        config = from_dict(read_json(training)["config"])
    else:
        config = Config(run=RunConfig(dir=""), data=DataConfig(tokenizer=""), stage=StageConfig())
        config.stage.name = IMPORTED
        if model.projector.pool == "none":  # Llama-3.2-Vision: as many tiles as it has places for
            config.data.max_tiles = model.vision.max_tiles
    config.stage.prompt = _prompt(options.stage, hf, config.stage)
    config.stage.name = options.stage or hf.get("moss_stage") or config.stage.name
    config.stage.silence_weight = float(hf.get("silence_weight") or 1.0)
    config.model, config.init_from = model, None
    config.adapter = Config().adapter
    config.data.tokenizer = ""
    return config


def _prompt(named_stage: str | None, hf: dict[str, Any], trained: StageConfig) -> str:
    """The form of the prompts of a stage that a user names, else what the export says. Where only
    a stage is known, its usual one."""
    if named_stage is None and hf.get("moss_prompt_form"):
        return str(hf["moss_prompt_form"])
    named = named_stage or hf.get("moss_stage")
    if named_stage is None and named == trained.name:
        return trained.prompt
    return STAGE_FORMS.get(named, trained.prompt)


def _copy(source: Path, out: Path, names: tuple[str, ...] | list[str]) -> None:
    for name in names:
        if (source / name).is_file():
            out.mkdir(exist_ok=True)
            shutil.copyfile(source / name, out / name)
