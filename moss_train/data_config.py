"""The configuration of the data: sources, batches, and the mixture of a stage."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from omegaconf import MISSING


@dataclass
class SourceConfig:
    """One folder of shards, drawn with `weight` among the sources of its modality."""

    name: str = MISSING
    path: str = MISSING
    modality: str = MISSING  # text | image | video
    weight: float = 1.0


@dataclass
class DataConfig:
    """Shards and batches. Batches count samples (conversations)."""

    name: str = "shards"
    root: str = ""  # a folder that the other paths of a preset refer to
    tokenizer: str = MISSING
    sources: list[SourceConfig] = field(default_factory=list)
    eval_sources: list[SourceConfig] = field(default_factory=list)  # held out, for validation
    eval_samples: int = 256  # of each, its first ones
    samples: int | None = None  # samples of the run; None: stage.samples
    global_batch: int = 256
    micro_batch: int = 1  # at most so many share a microbatch, packed into one sequence
    # A microbatch with more tokens or frames is divided, down to single samples; null: no bound.
    max_tokens_per_batch: int | None = None
    max_frames_per_batch: int | None = None
    max_tiles: int = 1
    sequence_length: int | None = None  # None: stage.sequence_length
    video_threads: int = 1  # of each decoder; more help where there are more cores than workers
    workers: int = 2  # loader processes for each data-parallel rank; 0: in the training process
    shuffle_buffer: int = 1000
    pad_multiple: int = 64  # microbatches are padded to a multiple of this, in tokens
    max_bad_ratio: float = 0.01  # stop when more than this share of the samples cannot be read
    audit: bool = False  # write the keys of every step to audit.jsonl


@dataclass
class MixtureConfig:
    """Share of each modality among a run's samples, in any unit, such as percent."""

    text: float = 0.0
    image: float = 79.0
    video: float = 21.0

    @property
    def wanted(self) -> dict[str, float]:
        """The modalities that have a share, with it."""
        return {name: share for name, share in asdict(self).items() if share > 0}
