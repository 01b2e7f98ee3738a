"""Checks of a configuration by itself, before any process group starts (resume.py: against the
checkpoint that it starts from).

Every problem is one line: the field, its value, what is allowed. All are collected, then raised
together as a ConfigError.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from data_pipeline import flash
from data_pipeline.attention_kinds import missing, refusals
from data_pipeline.fields import Range, wrong_values
from data_pipeline.fp8 import MULTIPLE
from data_pipeline.shards import check_source, shard_files
from data_pipeline.stores import is_url
from data_pipeline.tokens import SpecialTokens, load_tokenizer
from moss_train import hardware
from moss_train.config import WANDB_MODES, AdapterConfig, Config, ConfigError, LossConfig
from moss_train.data_config import EvalSuiteConfig, SourceConfig
from moss_train.log import log
from moss_train.model.hf_mapping import parameters_of, unmatched_targets
from moss_train.model_config import ModelConfig
from moss_train.model_sizes import not_multiple, unfit_sizes
from moss_train.overrides import configured_paths

POSITIVE = Range(above=0)
_VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)\}?")  # as a shell has them


def validate(config: Config, world_size: int) -> None:
    """Raises ConfigError with a line for everything that is wrong with `config`."""
    checks: tuple[Callable[[], Iterable[str]], ...] = (
        lambda: _fields(config),
        lambda: _relations(config, world_size),
        lambda: _data(config),
    )
    for check in checks:  # each of them relies on the ones before
        if problems := list(check()):
            raise ConfigError(problems)


def _fields(config: Config) -> Iterator[str]:
    """Each field by itself."""
    yield from wrong_values(config)
    yield from _paths(config)
    yield from _multipliers(config.optimizer.lr_multipliers)
    yield from _source_names(config.data.sources, "data.sources")
    yield from _source_names(config.data.eval_sources, "data.eval_sources")
    yield from _source_names(config.trainer.eval_suites, "trainer.eval_suites")


def _paths(config: Config) -> Iterator[str]:
    """Values that are known only now, as those of `${oc.env:...}`."""
    for field, value in configured_paths(config).items():
        if field != "data.root" and not value.strip():
            yield f"{field}=: is empty (an empty variable?): give a path"
        elif value != value.strip():
            yield f"{field}={value!r}: begins or ends with a blank: remove it"
        elif field != "data.root" and is_url(value):
            yield f"{field}={value}: is a URL: give a folder (only data.sources may be URLs)"
        elif (shell := _VARIABLE.search(value)) and not Path(value).exists():
            mend = f"write ${{oc.env:{shell[1]}}} for {shell[0]}"
            yield f"{field}={value}: no shell has put the variable in: {mend}"


def _source_names(sources: Sequence[SourceConfig | EvalSuiteConfig], field: str) -> Iterator[str]:
    counts = Counter(source.name for source in sources)
    for name, count in counts.items():
        if count > 1:
            yield f"{field}[{name}].name={name}: {count} of them have it: choose different names"
        if not name.strip() or "/" in name:  # sample keys are NAME/KEY
            spelt = name.replace("/", "-").strip() or "my-data"
            yield f"{field}[{name}].name={name}: must be a name without /, such as {spelt}"


def _relations(config: Config, world_size: int) -> Iterator[str]:
    """Fields that depend on each other."""
    yield from _numbers(config)
    yield from _model(config)
    yield from check_layout(config, world_size)
    yield from _batches(config, world_size)
    yield from _loggers(config)
    yield from _without_effect(config)


def _numbers(config: Config) -> Iterator[str]:
    stage = config.stage
    if config.lr not in POSITIVE:
        yield (
            f"stage.lr={stage.lr} x model.lr_scale={config.model.lr_scale}: is {config.lr}, must "
            f"be finite and {POSITIVE}"
        )
    if stage.video_max_frames < stage.video_min_frames:
        yield (
            f"stage.video_max_frames={stage.video_max_frames}: must be at least "
            f"stage.video_min_frames={stage.video_min_frames}"
        )
    try:
        _ = config.trainer.profiled_steps
    except ValueError as error:
        yield str(error)
    if config.trainer.steps is None and config.samples < config.data.global_batch:
        field = "stage.samples" if config.data.samples is None else "data.samples"
        yield (
            f"{field}={config.samples}: must be at least data.global_batch="
            f"{config.data.global_batch}: one step"
        )


def _multipliers(value: object) -> Iterator[str]:
    field = "optimizer.lr_multipliers"
    if value is None:
        return
    if not isinstance(value, dict):
        yield f"{field}={value}: must map patterns to factors, as in {{vision.*: 0.1}}"
        return
    for pattern, factor in value.items():
        if isinstance(factor, bool) or factor not in POSITIVE:
            yield (
                f"{field}[{pattern}]={factor}: must be a finite number {POSITIVE} "
                "(stage.train says what is frozen)"
            )


def _model(config: Config) -> Iterator[str]:
    yield from unfit_sizes(config.model)
    vision = config.model.vision
    if config.data.max_tiles > vision.max_tiles:
        yield (
            f"data.max_tiles={config.data.max_tiles}: the vision tower has embeddings for "
            f"{vision.max_tiles} tiles (model.vision.max_tiles)"
        )
    if config.adapter.name == "lora":
        unmatched = unmatched_targets(config.model, config.adapter.target)
        if unmatched or not config.adapter.target:
            wrong = unmatched or config.adapter.target
            yield f"adapter.target={wrong}: matches no linear layer of the decoder"
    if config.model.init.from_llama is not None:
        yield from _llama(config)


def _llama(config: Config) -> Iterator[str]:
    from moss_train.convert.llama import check_llama

    assert config.model.init.from_llama is not None
    if config.init_from is not None:
        yield f"init_from={config.init_from}: model.init.from_llama names other weights: drop one"
    try:
        yield from check_llama(Path(config.model.init.from_llama), config.model)
    except ConfigError as error:
        yield from error.problems


def check_layout(config: Config, world_size: int) -> Iterator[str]:
    """A line for everything in which model, layout and ranks do not fit together."""
    parallel, text = config.parallel, config.model.text
    ranks = parallel.tensor * parallel.pipeline
    if parallel.tensor < 1 or parallel.pipeline < 1 or parallel.virtual < 1:
        return
    if world_size % ranks:
        yield (
            f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline}: a replica "
            f"takes {ranks} ranks, and the job has {world_size}: start a multiple of {ranks}"
        )
    tensor = "parallel.tensor"
    for name, value in (
        ("model.text.num_heads", text.num_heads),
        ("model.text.num_kv_heads", text.num_kv_heads),
        ("model.text.mlp_size", text.mlp_size),
        ("model.text.vocab_size", text.vocab_size),
        ("the embedding's rows", text.vocab_size + text.extra_embedding_rows),
    ):
        yield from not_multiple(name, value, tensor, parallel.tensor)
    if parallel.vision_tensor:
        yield from not_multiple(
            "model.vision.num_heads", config.model.vision.num_heads, tensor, parallel.tensor
        )
    if parallel.sequence:
        if parallel.tensor == 1:
            yield "parallel.sequence=True: needs parallel.tensor of 2 or more"
        yield from not_multiple(
            "data.pad_multiple", config.data.pad_multiple, tensor, parallel.tensor
        )
    stages = parallel.pipeline * parallel.virtual
    if text.num_layers % stages:
        yield (
            f"model.text.num_layers={text.num_layers}: must be a multiple of parallel.pipeline="
            f"{parallel.pipeline} x parallel.virtual={parallel.virtual}"
        )
    if parallel.virtual > 1 and parallel.pipeline == 1:
        yield f"parallel.virtual={parallel.virtual}: needs parallel.pipeline of 2 or more"
    yield from _attention(config)
    reason = hardware.refusal(config.hardware.device)
    if reason:
        yield reason
    elif config.model.fp8 != "none":
        yield from _fp8(config)


def for_reading(model: ModelConfig, device: str) -> ModelConfig:
    """The `model` of a checkpoint with kernels of this machine: those that it was trained with are
    no property of its weights. An attention that cannot be had on `device` (one of hardware.KINDS)
    is sdpa, as a line says; linear layers compute in the weights' dtype, not in FP8.
    """
    lacking: list[str] = []
    if model.attention != "auto":
        lacking = missing(model.attention, model.attention_needs(hardware.kind_of(device)))
    if lacking:
        log.info("attention: sdpa (it was trained with %s: %s)", model.attention, lacking[0])
        model = replace(model, attention="sdpa")
    return replace(model, flex_backend="triton", fp8="none")


def _attention(config: Config) -> Iterator[str]:
    name, model = config.model.attention, config.model
    if name != "auto":
        needs = model.attention_needs(hardware.kind_of(config.hardware.device))
        yield from refusals("model.attention", name, needs)
    if model.flex_backend == "flash":
        yield from _flex_flash(config)


def _flex_flash(config: Config) -> Iterator[str]:
    field, model = "model.flex_backend=flash", config.model
    if model.attention != "flex":
        yield f"{field}: needs model.attention=flex (it is {model.attention})"
    if model.dtype != "bf16":
        yield f"{field}: needs model.dtype=bf16 (it is {model.dtype})"
    if not flash.has_release_4():
        yield f"{field}: flash-attn-4 is not installed (pip install --pre flash-attn-4)"


def _fp8(config: Config) -> Iterator[str]:
    field, parallel = f"model.fp8={config.model.fp8}", config.parallel
    for name, width in config.model.fp8_widths().items():
        if width % MULTIPLE:
            yield f"{field}: model.{name}={width}: must be a multiple of {MULTIPLE}"
    if parallel.tensor > 1 and config.model.fp8 == "all":
        yield f"{field}: needs parallel.tensor=1 (it is {parallel.tensor}): use model.fp8=tower"
    if parallel.tensor > 1 and parallel.vision_tensor:
        yield f"{field}: needs a tower that is whole: set parallel.vision_tensor=false"
    if hardware.kind_of(config.hardware.device) == "cpu":  # which computes the same in fp32
        return
    if not hardware.has_fp8():
        yield (
            f"{field}: {hardware.device_name()} does not multiply in FP8 (GPUs of compute "
            "capability 8.9 and later do): use model.fp8=none"
        )
    if config.model.dtype != "bf16":
        yield f"{field}: needs model.dtype=bf16 on a GPU (it is {config.model.dtype})"


def _batches(config: Config, world_size: int) -> Iterator[str]:
    parallel, data = config.parallel, config.data
    ranks = parallel.tensor * parallel.pipeline
    if ranks < 1 or world_size % ranks:
        return
    replicas = world_size // ranks
    samples = data.global_batch // replicas
    if data.global_batch % replicas:
        yield (
            f"data.global_batch={data.global_batch}: must be a multiple of the {replicas} "
            "data-parallel replicas"
        )
    elif parallel.virtual > 1 and samples < parallel.pipeline:
        yield (
            f"data.global_batch={data.global_batch}: gives {samples} samples a replica, which with "
            f"parallel.virtual={parallel.virtual} must be at least parallel.pipeline="
            f"{parallel.pipeline}: a microbatch for each stage"
        )


def _loggers(config: Config) -> Iterator[str]:
    logger = config.logger
    if logger.wandb and logger.wandb_mode is None and logger.mode not in WANDB_MODES:
        yield f"WANDB_MODE={logger.mode}: set it to online, offline or disabled"
    packages = {
        "wandb": logger.wandb and logger.mode != "disabled",
        "tensorboard": logger.tensorboard,
    }
    for package, used in packages.items():
        if used and importlib.util.find_spec(package) is None:
            yield f"logger.{package}=true needs the package {package}: pip install {package}"


def _without_effect(config: Config) -> Iterator[str]:
    """Fields that mean nothing without another one: who gives them wants that, too."""
    adapter, loss, logger = config.adapter, config.loss, config.logger
    if adapter.name == "none":
        for name, default in asdict(AdapterConfig()).items():
            if (value := getattr(adapter, name)) != default:
                mend = f"give adapter=lora, too, or leave it at {default}"
                yield f"adapter.{name}={value}: there is no adapter: {mend}"
    yield from _kept_frames(config)
    if loss.name == "weighted" and loss.focal_gamma != LossConfig().focal_gamma:
        gamma = f"loss.focal_gamma={loss.focal_gamma}"
        mend = f"give loss=state_balanced, too, or leave it at {LossConfig().focal_gamma}"
        yield f"{gamma}: has no part in loss=weighted: {mend}"
    for name, value in (("project", logger.project), ("wandb_mode", logger.wandb_mode)):
        if not logger.wandb and value not in (None, "disabled"):
            mend = "give logger=wandb, too, or leave it at null"
            yield f"logger.{name}={value}: wandb is off: {mend}"


def _kept_frames(config: Config) -> Iterator[str]:
    vision = config.model.vision
    field = f"model.vision.kept_frames={vision.kept_frames}"
    chunk = vision.frames_per_chunk or 1
    if not vision.kept_frames:
        return
    if not any(map(config.trains, parameters_of(config.model, "vision"))):
        yield f"{field}: the tower is frozen, and keeps nothing: leave it at 0, or train vision.*"
    elif not vision.recompute:
        yield f"{field}: model.vision.recompute=false keeps all frames: leave it at 0"
    elif vision.kept_frames < chunk:
        yield (
            f"{field}: a chunk is kept as a whole, and has model.vision.frames_per_chunk={chunk} "
            "frames: give as many, or make the chunks smaller"
        )


def _data(config: Config) -> Iterator[str]:
    shares = config.stage.mixture.shares
    if not shares:
        yield f"stage.mixture={asdict(config.stage.mixture)}: no modality has a share"
    present = {source.modality for source in config.data.sources}
    for modality in sorted(shares.keys() - present):
        yield (
            f"stage.mixture.{modality}={shares[modality]:g}: no data.sources has modality "
            f"{modality}: add one, or set the share to 0"
        )
    for source in config.data.sources:
        if shares.get(source.modality):
            yield from _complaints(check_source, source.path, f"data.sources[{source.name}].path")
    if config.trainer.eval_every is not None:
        if not config.data.eval_sources:
            yield f"trainer.eval_every={config.trainer.eval_every}: data.eval_sources is empty"
        for source in config.data.eval_sources:
            field = f"data.eval_sources[{source.name}].path"
            yield from _complaints(check_source, source.path, field)
    yield from _suites(config)
    yield from _tokenizer(config)


def _suites(config: Config) -> Iterator[str]:
    every, suites = config.trainer.eval_suites_every, config.trainer.eval_suites
    if every is not None and not suites:
        yield f"trainer.eval_suites_every={every}: trainer.eval_suites is empty"
    for suite in suites:
        if not Path(suite.path).is_file():
            yield from _complaints(
                shard_files, suite.path, f"trainer.eval_suites[{suite.name}].path"
            )


def _tokenizer(config: Config) -> Iterator[str]:
    try:
        tokenizer = load_tokenizer(config.data.tokenizer)
        tokens = SpecialTokens.from_tokenizer(tokenizer, config.data.tokenizer)
    except ValueError as error:
        yield f"data.tokenizer={config.data.tokenizer}: {error}"
        return
    rows = config.model.text.vocab_size + config.model.text.extra_embedding_rows
    if tokenizer.get_vocab_size() > rows or tokens.image >= rows:
        yield (
            f"data.tokenizer={config.data.tokenizer}: has {tokenizer.get_vocab_size()} tokens, the "
            f"embedding has {rows} rows (model.text.vocab_size + extra_embedding_rows)"
        )


def _complaints(check: Callable[[str], object], path: str, field: str) -> Iterator[str]:
    try:
        check(path)
    except (ValueError, OSError) as error:
        yield f"{field}={path}: {error}"
