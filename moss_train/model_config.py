"""The configuration of the model: vision tower, projector, decoder. Sizes are in elements."""

from __future__ import annotations

from dataclasses import dataclass, field

from data_pipeline.aspect_ratios import supported_aspect_ratios
from data_pipeline.attention_kinds import FRAMES, TEXT, TOWER, TRAINING, AttentionNeeds, kinds_of
from data_pipeline.fields import choice, number, numbers

MOST_FRAMES_PER_CHUNK = 16
POOLS = ("none", "average", "max", "bilinear", "channel_fusion")


@dataclass
class VisionConfig:
    """Vision tower. Image and patch sizes are in pixels; `max_tiles` sizes the tile tables."""

    hidden_size: int = number(1280, above=0)
    num_layers: int = number(32, above=0)
    num_global_layers: int = number(8, least=0)
    num_heads: int = number(16, above=0)
    mlp_size: int = number(5120, above=0)
    image_size: int = number(560, above=0)
    patch_size: int = number(14, above=0)
    max_tiles: int = number(4, above=0)
    intermediate_layers: list[int] = numbers([3, 7, 15, 23, 30], least=0)  # noqa: RUF009
    norm_eps: float = number(1e-5, above=0)
    full_attention: bool = True  # False: mask padding as Llama-3.2-Vision does
    # Frames encoded at once; bounds the tower's activation memory. None: as many as fit half of the
    # memory that is free on the GPU when training starts, 16 at most; on a CPU 16.
    frames_per_chunk: int | None = number(None, above=0)
    recompute: bool = True  # run a training tower's forward pass again for its backward pass
    # Frames of a rank and step that are left out of that, as many whole chunks as they have: their
    # activations are kept, beside all that the decoder needs.
    kept_frames: int = number(0, least=0)

    def kept_of(self, frames: int, chunk: int) -> int:
        """How many of a rank's frames are kept, of a step with so many of them, in chunks."""
        return frames if frames <= self.kept_frames else self.kept_frames // chunk * chunk

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

    pool: str = choice("average", POOLS)
    stride: int = number(4, above=0)


@dataclass
class RopeScalingConfig:
    """Llama-3's frequency scaling."""

    factor: float = number(8.0, above=0)
    low_freq_factor: float = number(1.0, above=0)
    high_freq_factor: float = number(4.0, above=0)
    original_max_position: int = number(8192, above=0)


@dataclass
class TextConfig:
    """Decoder. `num_layers` counts self-attention and cross-attention layers."""

    vocab_size: int = number(128256, above=0)  # rows of the output head
    # Rows of the embedding beyond vocab_size: <|image|> is the first.
    extra_embedding_rows: int = number(8, least=0)
    hidden_size: int = number(4096, above=0)
    num_layers: int = number(40, above=0)
    cross_attention_layers: list[int] = numbers(  # noqa: RUF009
        [3, 8, 13, 18, 23, 28, 33, 38], least=0
    )
    num_heads: int = number(32, above=0)
    num_kv_heads: int = number(8, above=0)
    mlp_size: int = number(14336, above=0)
    norm_eps: float = number(1e-5, above=0)
    rope_theta: float = number(500000.0, above=0)
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def shared_heads(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads


@dataclass
class InitConfig:
    """Random initialization, the same for every parallel layout; or a text model's weights."""

    std: float = number(0.02, above=0)
    embedding: float | None = number(None, above=0)  # of tokens; None: std
    position: float | None = number(None, above=0)  # of positions in the tower; None: std
    # Gates of cross-attention: 0 leaves a pretrained text model as it was.
    gate: float = number(0.0)
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
    # auto: the fastest that is right on this GPU; on a CPU sdpa. Who computes what:
    # data_pipeline/attention_kinds.py.
    attention: str = choice("auto", ("auto", *kinds_of(TRAINING)))
    # Who computes FlexAttention, where attention=flex asks for it: Triton, or FlashAttention-4.
    flex_backend: str = choice("triton", ("triton", "flash"))
    # auto: the kernels of model/kernels.py that are right on this GPU; torch: plain torch, as on a
    # CPU.
    kernels: str = choice("auto", ("auto", "torch"))
    # Linear layers that compute in FP8 (model/fp8.py): none | tower | all: the decoder's, too.
    fp8: str = choice("none", ("none", "tower", "all"))
    # Whether lengths in calls of attention are rounded up, so that a GPU's kernels are planned for
    # few shapes; auto: on a GPU.
    round_lengths: str = choice("auto", ("auto", "on", "off"))
    # What tokens that see no frame attend in the cross-attention: zero: nothing | attend_all: every
    # frame of their sample, as the published code does.
    tokens_before_first_frame: str = choice("zero", ("zero", "attend_all"))
    cross_attention_rope: bool = True  # False: plain Llama-3.2-Vision
    dtype: str = choice("bf16", ("bf16", "fp32"))
    lr_scale: float = number(1.0, above=0)

    def fp8_widths(self) -> dict[str, int]:
        """Widths of the layers that run in FP8, by field."""
        vision, text = self.vision, self.text
        tower = {"vision.hidden_size": vision.hidden_size, "vision.mlp_size": vision.mlp_size}
        decoder = {
            "text.hidden_size": text.hidden_size,
            "text.mlp_size": text.mlp_size,
            "text.num_kv_heads x head size": text.num_kv_heads * text.head_dim,
        }
        return {"none": {}, "tower": tower, "all": tower | decoder}[self.fp8]

    def attention_needs(self, device: str) -> AttentionNeeds:
        """What its layers ask of an attention on this kind of device."""
        tower = self.vision.hidden_size // self.vision.num_heads
        heads = {TEXT: self.text.head_dim, TOWER: tower, FRAMES: self.text.head_dim}
        mask = "" if self.vision.full_attention else "model.vision.full_attention=false"
        return AttentionNeeds(TRAINING, device, self.dtype, heads, mask)
