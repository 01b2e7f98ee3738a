"""Typed configuration: the dataclasses behind conf/; those of the data are in data_config.py.

Checks are in moss_train/validate.py.

Sizes are in elements, rates per second, times in seconds. Names in comments such as `stage.lr` are
the Hydra names, which a user overrides on the command line (`stage.lr=1e-4`).
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_pipeline.aspect_ratios import supported_aspect_ratios
from moss_train.data_config import DataConfig, MixtureConfig

# Fields of earlier versions and what they are called now. On a command line the old name is
# refused; files that an earlier version wrote are read.
RENAMED = {
    "model.blind_rows": "model.tokens_before_first_frame",
}


POOLS = ("none", "average", "max", "bilinear", "channel_fusion")


class ConfigError(ValueError):
    """A wrong configuration. Each line names a field, its value and what is allowed."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


@dataclass
class VisionConfig:
    """Vision tower. Image and patch sizes are in pixels; `max_tiles` sizes the tile tables."""

    hidden_size: int = 1280
    num_layers: int = 32
    num_global_layers: int = 8
    num_heads: int = 16
    mlp_size: int = 5120
    image_size: int = 560
    patch_size: int = 14
    max_tiles: int = 4
    intermediate_layers: list[int] = field(default_factory=lambda: [3, 7, 15, 23, 30])
    norm_eps: float = 1e-5
    full_attention: bool = True  # False: mask padding as Llama-3.2-Vision does
    frames_per_chunk: int = 16  # frames encoded at once; bounds the tower's activation memory
    recompute: bool = True  # run a training tower's forward pass again for its backward pass

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of a tile and its class token."""
        return self.grid**2 + 1

    @property
    def output_size(self) -> int:
        """Width of the tower's output: the final state and every intermediate state."""
        return self.hidden_size * (1 + len(self.intermediate_layers))

    @property
    def num_aspect_ratios(self) -> int:
        """Grids of at most `max_tiles` tiles (8 for 4 tiles)."""
        return len(supported_aspect_ratios(self.max_tiles))


@dataclass
class ProjectorConfig:
    """2-D pooling of the patch grid, then the linear projector."""

    pool: str = "average"  # one of POOLS
    stride: int = 4


@dataclass
class RopeScalingConfig:
    """Llama-3's frequency scaling."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass
class TextConfig:
    """Decoder. `num_layers` counts self-attention and cross-attention layers."""

    vocab_size: int = 128256  # rows of the output head
    extra_embedding_rows: int = 8  # rows of the embedding beyond it: <|image|> is the first
    hidden_size: int = 4096
    num_layers: int = 40
    cross_attention_layers: list[int] = field(
        default_factory=lambda: [3, 8, 13, 18, 23, 28, 33, 38]
    )
    num_heads: int = 32
    num_kv_heads: int = 8
    mlp_size: int = 14336
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


@dataclass
class InitConfig:
    """Random initialization, the same for every parallel layout; or a text model's weights."""

    std: float = 0.02
    embedding: float | None = None  # of tokens; None: std
    position: float | None = None  # of positions in the tower; None: std
    gate: float = 0.0  # gates of cross-attention: 0 leaves a pretrained text model as it was
    # Folder of a text-only Llama (config.json, safetensors) whose layers become the self-attention
    # layers in their order; gates are 0 then. Everything else is drawn.
    from_llama: str | None = None


@dataclass
class ModelConfig:
    """One model. `lr_scale` multiplies the stage's learning rate."""

    name: str = "11b"
    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    text: TextConfig = field(default_factory=TextConfig)
    init: InitConfig = field(default_factory=InitConfig)
    attention: str = "sdpa"  # sdpa | flash | te | flex (flex: for the cross-attention only)
    # What tokens that see no frame attend in the cross-attention: zero: nothing | attend_all: every
    # frame of their sample, as the published code does.
    tokens_before_first_frame: str = "zero"
    cross_attention_rope: bool = True  # False: plain Llama-3.2-Vision
    dtype: str = "bf16"  # bf16 | fp32
    lr_scale: float = 1.0


@dataclass
class ParallelConfig:
    """Layout. Data parallelism is what is left: world size / (tensor x pipeline)."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1  # model chunks of each pipeline rank (interleaved schedule)
    sequence: bool = False
    vision_tensor: bool = False  # shard the vision tower over `tensor` ranks too
    recompute: str = "none"  # none | selective | full
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False


@dataclass
class StageConfig:
    """One training stage. `train` and `also` are patterns of module names, as in `decoder.*`."""

    name: str = "pt1"
    train: list[str] = field(default_factory=lambda: ["projector.*"])
    also: list[str] = field(default_factory=list)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    prompt: str = "pretrain"  # pretrain | chat | realtime
    samples: int = 15_100_000
    sequence_length: int = 4096
    video_fps: float = 2.0
    video_min_frames: int = 8
    video_max_frames: int = 64
    lr: float = 2e-5
    warmup_ratio: float = 0.1  # of the steps
    warmup_steps: int | None = None  # in place of the ratio
    schedule: str = "cosine"  # cosine | linear | wsd (warm-up, stable, decay) | constant
    decay_ratio: float = 0.1  # wsd: share of the steps, the last ones, in which the rate falls
    silence_weight: float = 1.0  # of the labels <|silence|>
    swap_probability: float = 0.0  # of a real-time frame and the word before it, in training
    label_smoothing: float = 0.0
    z_loss: float = 0.0  # a usual one: 1e-4


@dataclass
class AdapterConfig:
    """LoRA on the decoder, whose own weights are frozen then."""

    name: str = "none"  # none | lora
    rank: int = 16
    alpha: float = 32.0  # the update is alpha / rank x B A
    # Patterns of names of linear layers, such as decoder.layers.*.linear_qkv.
    target: list[str] = field(default_factory=lambda: ["decoder.layers.*"])


@dataclass
class OptimizerConfig:
    """AdamW (megatron-core's distributed optimizer) and gradient clipping."""

    lr: float | None = None  # None: stage.lr x model.lr_scale
    min_lr_ratio: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # not of norms, gates and biases
    decay_embeddings: bool = True
    # {pattern of parameter names: factor on the learning rate}; the last match counts. Not typed
    # as a dict: Hydra lets nobody add a key to one on the command line.
    lr_multipliers: Any = None
    clip_grad: float = 1.0  # 0: no clipping

    @property
    def multipliers(self) -> dict[str, float]:
        """`lr_multipliers` (validated)."""
        return dict(self.lr_multipliers or {})


@dataclass
class TrainerConfig:
    """The loop. Intervals are in steps."""

    steps: int | None = None  # None: samples / global batch
    seed: int = 1234
    deterministic: bool = False  # the same numbers from the same run, to the bit; slower on CUDA
    checkpoint_every: int = 1000
    keep_last: int = 2
    eval_every: int | None = None  # steps between validations on data.eval_sources; None: none
    async_save: bool = False
    resume: str = "auto"  # auto: run.dir's latest checkpoint, if any | none | a checkpoint's path
    console_every: int = 1
    # A step is left out where loss or gradient is not finite, or the loss exceeds the median of the
    # last 100 by this factor; null: whatever it is.
    spike_factor: float | None = None
    max_skipped_steps: int = 5  # in a row; then back to the last checkpoint, on with other data


@dataclass
class LoggerConfig:
    """Sinks beside metrics.jsonl and the console."""

    wandb: bool = False
    tensorboard: bool = False
    project: str = "moss-video"
    wandb_mode: str = "online"  # online | offline


@dataclass
class HardwareConfig:
    """Device, CPU threads and time-out of each rank."""

    device: str = "auto"  # auto | cpu | cuda
    threads: int | None = None  # CPU threads of each rank; None: cores / ranks of this machine
    timeout_s: int = 600  # a collective that waits longer ends the job


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
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        if self.optimizer.lr is not None:
            return self.optimizer.lr
        return self.stage.lr * self.model.lr_scale

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        if self.trainer.steps is not None:
            return self.trainer.steps
        return max(1, (self.data.samples or self.stage.samples) // self.data.global_batch)

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises."""
        if self.stage.warmup_steps is not None:
            return self.stage.warmup_steps
        return round(self.steps * self.stage.warmup_ratio)

    @property
    def sequence_length(self) -> int:
        """Longest sequence in tokens."""
        return self.data.sequence_length or self.stage.sequence_length


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
        merged = OmegaConf.merge(OmegaConf.structured(Config), plain)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError([f"{key} is not set: give it a value, {key}=..." for key in missing])
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise _named(error) from None
    assert isinstance(config, Config)
    _expand_home(config)
    return config


def _expand_home(config: Config) -> None:
    """~ in every path: shells leave it in FIELD=~/x."""
    config.run.dir = os.path.expanduser(config.run.dir)
    config.trainer.resume = os.path.expanduser(config.trainer.resume)
    data, init = config.data, config.model.init
    data.root, data.tokenizer = map(os.path.expanduser, (data.root, data.tokenizer))
    for source in (*data.sources, *data.eval_sources):
        source.path = os.path.expanduser(source.path)
    if config.init_from is not None:
        config.init_from = os.path.expanduser(config.init_from)
    if init.from_llama is not None:
        init.from_llama = os.path.expanduser(init.from_llama)


def _named(error: OmegaConfBaseException) -> ConfigError:
    return ConfigError([f"{error.full_key or 'configuration'}: {str(error).splitlines()[0]}"])


def to_dict(config: Config) -> dict[str, Any]:
    """Plain containers, as saved in checkpoints and run folders."""
    try:
        plain = OmegaConf.to_container(OmegaConf.structured(config))
    except OmegaConfBaseException as error:  # somebody has set a field to a wrong value
        raise _named(error) from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


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
