"""Megatron -> Hugging Face: a checkpoint of any layout becomes a folder that transformers opens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.progress import Progress
from moss_train.checkpoint_dir import find, read_run
from moss_train.config import AdapterConfig, Config, from_dict
from moss_train.convert.folders import why_no_checkpoint
from moss_train.convert.hf_config import EXTRA_EMBEDDING_ROWS
from moss_train.convert.hf_files import HfFiles, check_plain, write_files
from moss_train.convert.job import (
    FiniteCheck,
    HashedFile,
    MemoryBudget,
    new_folder,
    run_workers,
    write_manifest,
)
from moss_train.convert.megatron_files import WeightFiles
from moss_train.convert.quantize import Quantizer
from moss_train.convert.source import SAFETENSORS_DTYPES, ConversionError
from moss_train.hardware import DTYPES
from moss_train.model.hf_mapping import Rule, hf_shapes, our_shape, table, to_hf
from moss_train.model_config import ModelConfig

SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
EMBEDDING = "decoder.embedding.weight"


@dataclass
class ToHf:
    """Options of `convert_megatron`; see tools/convert_checkpoint.py."""

    source: Path
    out: Path
    code: Path  # folder of the model's files for transformers: `inference`
    target: str | None = None  # moss | mllama; None: moss
    dtype: str | None = None  # fp32 | bf16; None: as stored
    quantize: str | None = None  # int8 | fp8
    stage: str | None = None
    tokenizer: Path | None = None
    max_shard_size: int = 5 * 10**9
    check_finite: bool = False
    workers: int = 2


@dataclass
class Tensors:
    """The HF tensors of one rule: name -> (shape, dtype), in the order of the file."""

    rule: Rule
    parts: dict[str, tuple[torch.Size, torch.dtype]]
    adapted: bool = False  # an adapter is merged into it, in fp32

    @property
    def bytes(self) -> int:
        """Their size on disk."""
        return sum(prod(shape) * dtype.itemsize for shape, dtype in self.parts.values())


@dataclass
class Shard:
    """A file of an export, and what it holds."""

    groups: list[Tensors] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Size of its weights."""
        return sum(group.bytes for group in self.groups)


def convert_megatron(options: ToHf) -> list[str]:
    """Writes the folder `options.out`; returns lines about what was made.

    Raises:
        ConversionError, ConfigError: there is no sound checkpoint, or the target cannot hold it.
            Nothing is left at `out`.
    """
    checkpoint = find(options.source)
    if checkpoint is None:
        raise ConversionError(f"{options.source}: {why_no_checkpoint(options.source)}")
    config = from_dict(read_run(checkpoint)["config"])
    target = options.target or "moss"
    if target == "mllama":
        check_plain(config.model, checkpoint)
    weights = WeightFiles(checkpoint)
    files = HfFiles.of(checkpoint, config, target, options.stage, options.tokenizer, options.code)
    source = Source(config, weights)
    quantizer = Quantizer(options.quantize) if options.quantize else None
    dtype = DTYPES[options.dtype] if options.dtype else None
    shards = plan_shards(
        [_tensors(source, rule, dtype, quantizer) for rule in table(config.model)],
        options.max_shard_size,
    )
    size = sum(shard.bytes for shard in shards)
    finite = FiniteCheck(options.check_finite)
    with new_folder(options.out, size) as partial:
        progress = Progress(f"{checkpoint} -> {options.out}", size, "GB", scale=1e9)

        def parts(group: Tensors) -> dict[str, Tensor]:
            whole = source.read(group.rule)
            for name, tensor in whole.items():
                finite.add(name, tensor)
            if quantizer is not None:
                whole = quantizer.quantize(whole, group.parts)
            made = {name: whole[name].to(kind) for name, (_, kind) in group.parts.items()}
            source.rounded(group.rule, whole, made)
            return made

        hashes = write_shards(partial, shards, parts, options.workers, progress.step)
        finite.finish(checkpoint)
        dtypes = {kind for shard in shards for g in shard.groups for _, kind in g.parts.values()}
        lines = write_files(partial, files, dtypes, quantizer)
        facts = {"source": str(checkpoint), "stage": files.stage, "bytes": size}
        write_manifest(partial, hashes, facts)
    return [progress.summary(), *_dropped(config.model), *source.loss_of_updates(), *lines]


def _dropped(model: ModelConfig) -> Iterator[str]:
    extra = model.text.extra_embedding_rows - EXTRA_EMBEDDING_ROWS
    if extra > 0:
        yield f"embedding: without its last {extra} rows, for which transformers has no place"


class Source:
    """The weights of a checkpoint as HF tensors, adapters merged.

    Raises:
        ConversionError: names every tensor that the checkpoint lacks, has beyond the model's, or
            has in another shape.
    """

    def __init__(self, config: Config, weights: WeightFiles):
        self.model, self.weights = config.model, weights
        self.adapter: AdapterConfig = config.adapter
        # By parameter: norm of the adapter's update, and the share of it that rounding lost.
        self.updates: dict[str, float] = {}
        self.lost: dict[str, float] = {}
        problems = []
        shapes = {rule.ours: our_shape(config.model, rule) for rule in table(config.model)}
        for name, shape in shapes.items():
            if name not in weights.shapes:
                problems.append(f"missing: {name} {list(shape)}")
            elif weights.shapes[name] != shape:
                have = list(weights.shapes[name])
                problems.append(f"misshapen: {name} {have}, must be {list(shape)}")
        adapters = self.adapter.name != "none"
        for name in weights.shapes.keys() - shapes.keys():
            if not (adapters and name.endswith((".lora_a", ".lora_b"))):
                problems.append(f"surplus: {name} {list(weights.shapes[name])}")
        if problems:
            raise ConversionError(
                "\n".join([f"{weights.folder}: its tensors are not its model's", *problems])
            )

    def read(self, rule: Rule) -> dict[str, Tensor]:
        """Whole HF tensors of a rule, with transformers' number of rows in the embedding."""
        whole = self.weights.read(rule.ours)
        if self.adapted(rule):
            update = self._update(rule)
            whole = whole.float().add_(update)
            self.updates[rule.ours] = float(update.norm())
        if rule.ours == EMBEDDING:
            return {rule.hf[0]: _rows(whole, self.hf_shapes(rule)[rule.hf[0]][0])}
        return to_hf(self.model, rule, [whole])

    def adapted(self, rule: Rule) -> bool:
        """True where an adapter is merged into a parameter."""
        return f"{rule.ours.removesuffix('weight')}lora_a" in self.weights.shapes

    def _update(self, rule: Rule) -> Tensor:
        layer = rule.ours.removesuffix("weight")
        a, b = (self.weights.read(f"{layer}lora_{letter}").float() for letter in "ab")
        return (b @ a).mul_(self.adapter.alpha / self.adapter.rank)

    def rounded(self, rule: Rule, exact: dict[str, Tensor], made: dict[str, Tensor]) -> None:
        """Notes how much of an adapter's update the rounding of `exact` to `made` loses."""
        update = self.updates.get(rule.ours)
        if not update:
            return
        parts = [name for name in exact if name in made and made[name].is_floating_point()]
        parts = [name for name in parts if made[name].dtype.itemsize == 2]
        off = sum(float((made[name].float() - exact[name]).square().sum()) for name in parts)
        self.lost[rule.ours] = off**0.5 / update

    def loss_of_updates(self) -> Iterator[str]:
        """A line where rounding loses more than a tenth of the adapters' updates."""
        mean = sum(self.lost.values()) / max(1, len(self.lost))
        if mean > 0.1:
            worst = max(self.lost, key=lambda name: self.lost[name])
            yield (
                f"adapters: rounding the merged weights to bf16 loses {mean:.0%} of the updates "
                f"(at most {self.lost[worst]:.0%}, of {worst}): --dtype fp32 keeps them"
            )

    def hf_shapes(self, rule: Rule) -> dict[str, torch.Size]:
        """Shapes of the tensors that `read` returns."""
        shapes = hf_shapes(self.model, rule)
        if rule.ours == EMBEDDING:
            text = self.model.text
            rows = text.vocab_size + EXTRA_EMBEDDING_ROWS
            return {rule.hf[0]: torch.Size([rows, text.hidden_size])}
        return shapes


def _rows(embedding: Tensor, count: int) -> Tensor:
    """Rows that were added so that ranks divide them go; those that are too few are zero."""
    missing = count - len(embedding)
    if missing <= 0:
        return embedding[:count]
    return torch.cat((embedding, embedding.new_zeros(missing, embedding.shape[1])))


def _tensors(
    source: Source, rule: Rule, dtype: torch.dtype | None, quantizer: Quantizer | None
) -> Tensors:
    kind = dtype or source.weights.dtypes[rule.ours]
    parts = {name: (shape, kind) for name, shape in source.hf_shapes(rule).items()}
    planned = parts if quantizer is None else quantizer.plan(parts)
    return Tensors(rule, planned, source.adapted(rule))


def plan_shards(groups: list[Tensors], largest: int) -> list[Shard]:
    """Fills shards of at most `largest` bytes in order; what belongs to one rule stays together."""
    shards = [Shard()]
    for group in groups:
        if shards[-1].groups and shards[-1].bytes + group.bytes > largest:
            shards.append(Shard())
        shards[-1].groups.append(group)
    return shards


def header(shard: Shard) -> bytes:
    """The head of a safetensors file: the length of a JSON object, and the object."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for group in shard.groups:
        for name, (shape, dtype) in group.parts.items():
            end = offset + prod(shape) * dtype.itemsize
            places = {"shape": list(shape), "data_offsets": [offset, end]}
            entries[name] = {"dtype": SAFETENSORS_NAMES[dtype], **places}
            offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers that follow are aligned
    return len(text).to_bytes(8, "little") + text


def write_shards(
    folder: Path,
    shards: list[Shard],
    parts: Callable[[Tensors], dict[str, Tensor]],
    workers: int,
    on_bytes: Callable[[int], None],
) -> dict[str, str]:
    """Writes the shards and their index; returns the files' hashes."""
    largest = max(prod(s) * d.itemsize for _, s, d in _all(shards))
    memory = MemoryBudget(3 * largest)
    names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]

    def write(number: int) -> str:
        shard = shards[number]
        file = HashedFile(folder / names[number])
        file.write(header(shard))
        for group in shard.groups:
            with memory.lend((8 if group.adapted else 2) * group.bytes):
                tensors = parts(group)
                for name in group.parts:
                    file.write(tensors[name].contiguous().view(-1).view(torch.uint8).numpy())
                del tensors
            on_bytes(group.bytes)
        return file.close()

    hashes = run_workers(range(len(shards)), write, workers)
    places = {
        name: file
        for shard, file in zip(shards, names, strict=True)
        for name, _, _ in _all([shard])
    }
    index = {"metadata": {"total_size": sum(s.bytes for s in shards)}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return dict(zip(names, hashes, strict=True))


def _all(shards: list[Shard]) -> Iterator[tuple[str, torch.Size, torch.dtype]]:
    for shard in shards:
        for group in shard.groups:
            for name, (shape, dtype) in group.parts.items():
                yield name, shape, dtype
