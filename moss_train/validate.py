"""Checks of a configuration by itself, before any process group starts (resume.py: against the
checkpoint that it starts from).

Every problem is one line: the field, its value, what is allowed. All are collected, then raised
together as a ConfigError.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path

from data_pipeline.shards import check_source
from data_pipeline.tokens import SpecialTokens, load_tokenizer
from moss_train.config import POOLS, Config, ConfigError
from moss_train.hardware import DTYPES, has_cuda
from moss_train.model.hf_mapping import unmatched_targets

CHOICES = {
    "model.attention": ("sdpa", "flash", "te", "flex"),
    "model.tokens_before_first_frame": ("zero", "attend_all"),
    "model.dtype": tuple(DTYPES),
    "model.projector.pool": POOLS,
    "parallel.recompute": ("none", "selective", "full"),
    "stage.prompt": ("pretrain", "chat", "realtime"),
    "stage.schedule": ("cosine", "linear", "wsd", "constant"),
    "adapter.name": ("none", "lora"),
    "hardware.device": ("auto", "cpu", "cuda"),
    "logger.wandb_mode": ("online", "offline"),
}
POSITIVE = (  # or None, where a field may be
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.virtual",
    "data.global_batch",
    "data.micro_batch",
    "data.eval_samples",
    "data.max_tiles",
    "data.video_threads",
    "data.pad_multiple",
    "data.shuffle_buffer",
    "data.max_tokens_per_batch",
    "data.max_frames_per_batch",
    "trainer.steps",
    "trainer.checkpoint_every",
    "trainer.keep_last",
    "trainer.eval_every",
    "trainer.max_skipped_steps",
    "trainer.console_every",
    "model.vision.frames_per_chunk",
    "model.text.num_layers",
    "adapter.rank",
    "adapter.alpha",
    "hardware.timeout_s",
    "stage.video_fps",
    "stage.video_min_frames",
)
SHARES = (  # of 1
    "stage.decay_ratio",
    "stage.warmup_ratio",
    "optimizer.min_lr_ratio",
    "data.max_bad_ratio",
    "stage.silence_weight",
    "stage.swap_probability",
    "stage.label_smoothing",
    "stage.z_loss",
)


def validate(config: Config, world_size: int) -> None:
    """Raises ConfigError with a line for everything that is wrong with `config`."""
    problems = [
        *_choices(config),
        *_numbers(config),
        *_model(config),
        *check_layout(config, world_size),
        *_batches(config, world_size),
    ]
    problems += _data(config) if not problems else []
    if problems:
        raise ConfigError(problems)


def _choices(config: Config) -> Iterator[str]:
    for name, choices in CHOICES.items():
        value = attrgetter(name)(config)
        if value not in choices:
            yield f"{name}={value}: choose one of {', '.join(choices)}"


def _numbers(config: Config) -> Iterator[str]:
    """Each number alone, and those that depend on each other."""
    for name in POSITIVE:
        value = attrgetter(name)(config)
        if value is not None and value <= 0:
            yield f"{name}={value}: must be greater than 0"
    for name in SHARES:
        value = attrgetter(name)(config)
        if not 0 <= value <= 1:
            yield f"{name}={value}: must be between 0 and 1"
    stage, spike = config.stage, config.trainer.spike_factor
    if spike is not None and spike <= 1:
        yield f"trainer.spike_factor={spike}: must be greater than 1"
    if config.data.workers < 0:
        yield f"data.workers={config.data.workers}: must be 0 (no worker processes) or more"
    if config.lr <= 0:
        yield f"optimizer.lr={config.lr}: must be greater than 0"
    yield from _multipliers(config.optimizer.lr_multipliers)
    if stage.warmup_steps is not None and stage.warmup_steps < 0:
        yield f"stage.warmup_steps={stage.warmup_steps}: must be 0 or more"
    if stage.video_max_frames < stage.video_min_frames:
        yield (
            f"stage.video_max_frames={stage.video_max_frames}: must be at least "
            f"stage.video_min_frames={stage.video_min_frames}"
        )


def _multipliers(value: object) -> Iterator[str]:
    field = "optimizer.lr_multipliers"
    if value is None:
        return
    if not isinstance(value, dict):
        yield f"{field}={value}: must map patterns to factors, as in {{vision.*: 0.1}}"
        return
    for pattern, factor in value.items():
        if not isinstance(factor, int | float) or factor <= 0:
            yield (
                f"{field}[{pattern}]={factor}: must be a number greater than 0 "
                "(stage.train says what is frozen)"
            )


def _model(config: Config) -> Iterator[str]:
    text, vision, projector = config.model.text, config.model.vision, config.model.projector
    yield from _divides("model.text.hidden_size", text.hidden_size, "num_heads", text.num_heads)
    yield from _divides("model.text.num_heads", text.num_heads, "num_kv_heads", text.num_kv_heads)
    yield from _divides(
        "model.vision.hidden_size", vision.hidden_size, "num_heads", vision.num_heads
    )
    yield from _divides(
        "model.vision.image_size", vision.image_size, "patch_size", vision.patch_size
    )
    if projector.pool != "none":
        yield from _divides("the patch grid", vision.grid, "projector.stride", projector.stride)
    outside = [i for i in text.cross_attention_layers if not 0 <= i < text.num_layers]
    if outside:
        yield (
            f"model.text.cross_attention_layers={outside}: layers are numbered "
            f"0..{text.num_layers - 1} (model.text.num_layers={text.num_layers})"
        )
    outside = [i for i in vision.intermediate_layers if not 0 <= i < vision.num_layers]
    if outside:
        yield (
            f"model.vision.intermediate_layers={outside}: layers are numbered "
            f"0..{vision.num_layers - 1} (model.vision.num_layers={vision.num_layers})"
        )
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
    if config.model.attention == "flash" and not vision.full_attention:
        yield "model.attention=flash: takes no mask, which model.vision.full_attention=false needs"


def _llama(config: Config) -> Iterator[str]:
    from moss_train.convert.llama import check_llama

    assert config.model.init.from_llama is not None
    if config.init_from is not None:
        yield f"init_from={config.init_from}: model.init.from_llama names other weights: drop one"
    try:
        yield from check_llama(Path(config.model.init.from_llama), config.model)
    except ConfigError as error:
        yield from error.problems


def _divides(name: str, value: int, by: str, divisor: int) -> Iterator[str]:
    if divisor <= 0 or value % divisor:
        yield f"{name}={value}: must be a multiple of {by}={divisor}"


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
        yield from _divides(name, value, tensor, parallel.tensor)
    if parallel.vision_tensor:
        yield from _divides(
            "model.vision.num_heads", config.model.vision.num_heads, tensor, parallel.tensor
        )
    if parallel.sequence:
        if parallel.tensor == 1:
            yield "parallel.sequence=True: needs parallel.tensor of 2 or more"
        yield from _divides("data.pad_multiple", config.data.pad_multiple, tensor, parallel.tensor)
    stages = parallel.pipeline * parallel.virtual
    if text.num_layers % stages:
        yield (
            f"model.text.num_layers={text.num_layers}: must be a multiple of parallel.pipeline="
            f"{parallel.pipeline} x parallel.virtual={parallel.virtual}"
        )
    if parallel.virtual > 1 and parallel.pipeline == 1:
        yield f"parallel.virtual={parallel.virtual}: needs parallel.pipeline of 2 or more"
    yield from _optional_package(config)
    if config.hardware.device == "cuda" and not has_cuda():
        yield "hardware.device=cuda: torch finds no CUDA device: use cpu"
    if config.model.attention == "te" and config.hardware.device == "cpu":
        yield "model.attention=te: Transformer Engine needs CUDA, hardware.device is cpu: use sdpa"


def _optional_package(config: Config) -> Iterator[str]:
    packages = {"flash": ("flash_attn", "flash"), "te": ("transformer_engine", "te")}
    if config.model.attention in packages:
        package, extra = packages[config.model.attention]
        if importlib.util.find_spec(package) is None:
            yield (
                f"model.attention={config.model.attention}: the package {package} is not "
                f"installed: pip install 'moss-train[{extra}]', or choose sdpa"
            )


def _batches(config: Config, world_size: int) -> Iterator[str]:
    parallel, data = config.parallel, config.data
    ranks = parallel.tensor * parallel.pipeline
    if ranks < 1 or world_size % ranks or data.micro_batch < 1:
        return
    replicas = world_size // ranks
    unit = data.micro_batch * replicas
    if data.global_batch % unit:
        yield (
            f"data.global_batch={data.global_batch}: must be a multiple of data.micro_batch="
            f"{data.micro_batch} x {replicas} data-parallel replicas"
        )
    elif parallel.virtual > 1 and (data.global_batch // unit) % parallel.pipeline:
        yield (
            f"data.global_batch={data.global_batch}: gives {data.global_batch // unit} "
            f"microbatches a replica, which with parallel.virtual={parallel.virtual} must be a "
            f"multiple of parallel.pipeline={parallel.pipeline}"
        )


def _data(config: Config) -> Iterator[str]:
    shares = config.stage.mixture.wanted
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
    yield from _tokenizer(config)


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
