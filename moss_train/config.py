"""Typed configuration: the dataclasses behind conf/; model_config.py and data_config.py have those
of the model and of the data.

The range of a number and the choices of a name stand beside the field (data_pipeline/fields.py);
moss_train/validate.py checks them, and how fields fit together.

Sizes are in elements, rates per second, times in seconds. Names in comments such as `stage.lr` are
the Hydra names, which a user overrides on the command line (`stage.lr=1e-4`).
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_pipeline.fields import choice, number
from moss_train.data_config import (
    PACKED_TILES,
    PACKED_TOKENS,
    DataConfig,
    EvalSuiteConfig,
    MixtureConfig,
)
from moss_train.field_errors import explain_field
from moss_train.model_config import ModelConfig

# Fields of earlier versions and what they are called now. On a command line the old name is
# refused; files that an earlier version wrote are read.
RENAMED = {
    "model.blind_rows": "model.tokens_before_first_frame",
    "data.shuffle_buffer": "data.shuffle_window",
}


# What wandb takes in WANDB_MODE, and what it means.
WANDB_MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline"}
WANDB_MODES["disabled"] = "disabled"


class ConfigError(ValueError):
    """A wrong configuration. Each line names a field, its value and what is allowed."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


@dataclass
class ParallelConfig:
    """Layout. Data parallelism is what is left: world size / (tensor x pipeline)."""

    tensor: int = number(1, above=0)
    pipeline: int = number(1, above=0)
    virtual: int = number(1, above=0)  # model chunks of each pipeline rank (interleaved schedule)
    sequence: bool = False
    vision_tensor: bool = False  # shard the vision tower over `tensor` ranks too
    recompute: str = choice("none", ("none", "selective", "full"))
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False

    @property
    def vision_slices(self) -> int:
        """Tensor ranks that share a vision tower."""
        return self.tensor if self.vision_tensor else 1


@dataclass
class StageConfig:
    """One training stage. `train` and `also` are patterns of module names, as in `decoder.*`."""

    name: str = "pt1"
    train: list[str] = field(default_factory=lambda: ["projector.*"])
    also: list[str] = field(default_factory=list)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    prompt: str = choice("pretrain", ("pretrain", "chat", "realtime"))
    samples: int = number(15_100_000, above=0)
    sequence_length: int = number(4096, above=1)  # in tokens
    video_fps: float = number(2.0, above=0)
    video_min_frames: int = number(8, above=0)
    video_max_frames: int = number(64, above=0)
    lr: float = number(2e-5, above=0)
    warmup_ratio: float = number(0.1, least=0, most=1)  # of the steps
    warmup_steps: int | None = number(None, least=0)  # in place of the ratio
    # wsd: warm-up, stable, decay in the last `decay_ratio` of the steps.
    schedule: str = choice("cosine", ("cosine", "linear", "wsd", "constant"))
    decay_ratio: float = number(0.1, least=0, most=1)
    silence_weight: float = number(1.0, least=0, most=1)  # of the labels <|silence|>
    # Probability that a real-time frame and the word before it change places, in training.
    swap_probability: float = number(0.0, least=0, most=1)
    label_smoothing: float = number(0.0, least=0, most=1)
    z_loss: float = number(0.0, least=0, most=1)  # a usual one: 1e-4


@dataclass
class LossConfig:
    """What a label weighs: 1, and silence `stage.silence_weight`; or by its state, and by how sure
    the model is of it (model/states.py)."""

    name: str = choice("weighted", ("weighted", "state_balanced"))
    focal_gamma: float = number(2.0, least=0)  # of state_balanced; 0: no focal factor


@dataclass
class AdapterConfig:
    """LoRA on the decoder, whose own weights are frozen then."""

    name: str = choice("none", ("none", "lora"))
    rank: int = number(16, above=0)
    alpha: float = number(32.0, above=0)  # the update is alpha / rank x B A
    # Patterns of names of linear layers, such as decoder.layers.*.linear_qkv.
    target: list[str] = field(default_factory=lambda: ["decoder.layers.*"])


@dataclass
class OptimizerConfig:
    """AdamW (megatron-core's distributed optimizer) and gradient clipping."""

    lr: float | None = number(None, above=0)  # None: stage.lr x model.lr_scale
    min_lr_ratio: float = number(0.0, least=0, most=1)
    beta1: float = number(0.9, least=0, below=1)
    beta2: float = number(0.95, least=0, below=1)
    eps: float = number(1e-8, above=0)
    weight_decay: float = number(0.1, least=0)  # not of norms, gates and biases
    decay_embeddings: bool = True
    # {pattern of parameter names: factor on the learning rate}; the last match counts. Not typed
    # as a dict: Hydra lets nobody add a key to one on the command line.
    lr_multipliers: Any = None
    clip_grad: float = number(1.0, least=0, zero="no clipping")

    @property
    def multipliers(self) -> dict[str, float]:
        """`lr_multipliers` (validated)."""
        return dict(self.lr_multipliers or {})


@dataclass
class TrainerConfig:
    """The loop. Intervals are in steps."""

    steps: int | None = number(None, above=0)  # None: samples / global batch
    seed: int = number(1234, least=0, below=2**32)
    deterministic: bool = False  # the same numbers from the same run, to the bit; slower on CUDA
    checkpoint_every: int = number(1000, above=0)
    keep_last: int = number(2, above=0)
    # Steps between validations on data.eval_sources; None: none.
    eval_every: int | None = number(None, above=0)
    # Samples with known answers that are asked every so many steps, and after the last one (null:
    # then alone).
    eval_suites: list[EvalSuiteConfig] = field(default_factory=list)
    eval_suites_every: int | None = number(None, above=0)
    async_save: bool | None = None  # None: on a GPU
    resume: str = "auto"  # auto: run.dir's latest checkpoint, if any | none | a checkpoint's path
    # Begin at step 1 where run.dir has checkpoints and none can be loaded; they become .damaged_*.
    start_over: bool = False
    # A run that goes on with other data or shares is refused (exact), or goes on, and what has
    # changed begins anew (fresh).
    resume_data: str = choice("exact", ("exact", "fresh"))
    console_every: int = number(1, above=0)
    # A step is left out where loss or gradient is not finite, or the loss exceeds the median of the
    # last 100 by this factor; null: whatever it is.
    spike_factor: float | None = number(None, above=1)
    # In a row; then back to the last checkpoint, on with other data.
    max_skipped_steps: int = number(5, above=0)
    # Steps after which ranks are named that were slower than 1.25 times the median; null: never.
    slow_ranks_every: int | None = number(100, above=0)
    # Steps between comparisons, bit for bit, of ranks that hold the same weights; null: before each
    # save alone.
    compare_replicas_every: int | None = number(None, above=0)
    # Steps that torch's profiler watches on rank 0, like 10..12, into run.dir/profile.
    profile: str | None = None

    @property
    def profiled_steps(self) -> tuple[int, int] | None:
        """The first and the last step of `profile`.

        Raises:
            ValueError: it is not of that form, or the last comes before the first.
        """
        if self.profile is None:
            return None
        found = re.fullmatch(r"(?:steps=)?(\d+)(?:\.\.(\d+))?", self.profile)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= first <= last:
            raise ValueError(
                f"trainer.profile={self.profile}: give the first and the last step, like 10..12"
            )
        return first, last


@dataclass
class LoggerConfig:
    """Sinks beside metrics.jsonl and the console."""

    wandb: bool = False
    tensorboard: bool = False
    project: str | None = None  # None: that of WANDB_PROJECT, or moss-video
    # None: that of WANDB_MODE, or online.
    wandb_mode: str | None = choice(None, ("online", "offline", "disabled"))

    @property
    def mode(self) -> str:
        """`wandb_mode`, else what the environment says (validated)."""
        mode = os.environ.get("WANDB_MODE") or "online"
        return self.wandb_mode or WANDB_MODES.get(mode, mode)


@dataclass
class HardwareConfig:
    """Device, CPU threads and time limits of each rank."""

    device: str = choice("auto", ("auto", "cuda", "cpu", "npu"))
    # CPU threads of each rank; None: cores / ranks of this machine.
    threads: int | None = number(None, above=0, most=4096)
    timeout_s: int = number(600, above=0, most=10**9)  # a collective that waits longer ends the job
    # Seconds without a sign of life of a rank in a step, after which the job is ended, with who is
    # late and where (five usual steps where those are longer). null: nobody watches.
    hang_s: float | None = number(60.0, above=0)
    # The same while a rank starts, loads, saves or waits for data: a storage may be slow.
    hang_io_s: float = number(500.0, above=0)


@dataclass
class RunConfig:
    """The run folder. Hydra fills in the default `runs/STAGE-TIMESTAMP`."""

    dir: str = MISSING


@dataclass
class Config:
    """Everything of one run."""

    init_from: str | None = None  # run folder or checkpoint whose weights (only) are loaded
    run: RunConfig = field(default_factory=RunConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    def trains(self, name: str) -> bool:
        """Whether a parameter is trained; those of the decoder are not where it has an adapter."""
        adapted = self.adapter.name != "none" and name.startswith("decoder.")
        patterns = [*self.stage.train, *self.stage.also]
        return not adapted and any(fnmatchcase(name, pattern) for pattern in patterns)

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        if self.optimizer.lr is not None:
            return self.optimizer.lr
        return self.stage.lr * self.model.lr_scale

    @property
    def samples(self) -> int:
        """Samples of the run, where `trainer.steps` does not say how long it is."""
        return self.stage.samples if self.data.samples is None else self.data.samples

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        if self.trainer.steps is not None:
            return self.trainer.steps
        return self.samples // self.data.global_batch

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises."""
        if self.stage.warmup_steps is not None:
            return self.stage.warmup_steps
        return round(self.steps * self.stage.warmup_ratio)

    @property
    def decay_steps(self) -> int:
        """Last steps in which the rate of the schedule wsd falls."""
        return round(self.steps * self.stage.decay_ratio)

    @property
    def microbatch_tokens(self) -> int:
        """Tokens of a microbatch, at most."""
        own = self.data.max_tokens_per_batch
        return max(PACKED_TOKENS, self.sequence_length) if own is None else own

    @property
    def microbatch_frames(self) -> int:
        """Frames of a microbatch, at most."""
        own = self.data.max_frames_per_batch
        packed = PACKED_TILES // self.data.max_tiles
        return max(packed, self.stage.video_max_frames) if own is None else own

    @property
    def sequence_length(self) -> int:
        """Longest sequence in tokens."""
        own = self.data.sequence_length
        return self.stage.sequence_length if own is None else own


def from_hydra(raw: DictConfig) -> Config:
    """The typed configuration of what Hydra composed.

    Raises:
        ConfigError: an unknown field, a missing value, or a value of the wrong type.
    """
    for old, new in RENAMED.items():
        if OmegaConf.select(raw, old) is not None:
            raise ConfigError([f"{old}: is called {new} now: use that name"])
    try:
        # Plain first: fields that Hydra's `+` added to the typed nodes are unknown ones, too.
        plain = OmegaConf.to_container(raw)
        merged = OmegaConf.merge(_schema(), plain)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError([f"{key} is not set: give it a value, {key}=..." for key in missing])
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError([explain_field(error, Config)]) from None
    assert isinstance(config, Config)
    _expand_home(config)
    return config


@cache
def _schema() -> DictConfig:
    """The fields, their types and defaults; OmegaConf takes as long to read them from the classes
    as to fill them, and merges into a copy."""
    return OmegaConf.structured(Config)


def _expand_home(config: Config) -> None:
    """~ in every path: shells leave it in FIELD=~/x."""
    config.run.dir = os.path.expanduser(config.run.dir)
    config.trainer.resume = os.path.expanduser(config.trainer.resume)
    data, init = config.data, config.model.init
    data.root, data.tokenizer = map(os.path.expanduser, (data.root, data.tokenizer))
    for source in (*data.sources, *data.eval_sources):
        source.path = os.path.expanduser(source.path)
    for suite in config.trainer.eval_suites:
        suite.path = os.path.expanduser(suite.path)
    if config.init_from is not None:
        config.init_from = os.path.expanduser(config.init_from)
    if init.from_llama is not None:
        init.from_llama = os.path.expanduser(init.from_llama)


def checked(config: Config) -> Config:
    """A copy of a configuration whose fields somebody may have set since.

    Raises:
        ConfigError: a value has the wrong type.
    """
    try:
        raw = OmegaConf.structured(config)
    except OmegaConfBaseException as error:
        raise ConfigError([explain_field(error, Config)]) from None
    return from_hydra(raw)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain containers, as saved in checkpoints and run folders."""
    return asdict(config)


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"a": {"b": 1}}` -> `("a.b", 1)`."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def from_dict(plain: dict[str, Any]) -> Config:
    """The configuration of what `to_dict` returned, in this version or an earlier one."""
    return from_hydra(OmegaConf.create(present_names(plain)))


def present_names(plain: dict[str, Any]) -> dict[str, Any]:
    """A copy of a saved configuration, its fields under the names that they have now."""
    renamed = copy.deepcopy(plain)
    for old, new in RENAMED.items():
        group, _, name = old.rpartition(".")
        fields = renamed.get(group, {})
        if name in fields:
            fields[new.rpartition(".")[2]] = fields.pop(name)
    return renamed
