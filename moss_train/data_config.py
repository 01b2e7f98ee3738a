"""The configuration of the data: sources, batches, and the mixture of a stage."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

from omegaconf import MISSING

from data_pipeline.fields import choice, choices, number
from data_pipeline.stores import StoreOptions

MODALITIES = ("text", "image", "video")
# What a model may be shown in place of a sample's frames (evaluate/controls.py).
CONTROLS = ("blind", "one_frame", "shuffled")
PACKED_TOKENS = 4096  # enough that a GPU computes longer than the host takes to say what
PACKED_TILES = 256  # their encoder takes a GPU longer than all else, however they are packed


@dataclass
class SourceConfig:
    """One folder of shards, drawn with `weight` among the sources of its modality.

    path: a path, or a URL (`s3://`, `gs://`, `hf://`, ...).
    """

    name: str = MISSING
    path: str = MISSING
    modality: str = choice(MISSING, MODALITIES)
    weight: float = number(1.0, above=0)


@dataclass
class EvalSuiteConfig:
    """Samples with known answers, scored during training by evaluate/.

    path: a folder of shards, or a JSONL file of samples.
    samples: the first ones of it.
    scores: `likelihood` leaves out what needs generation: a pass over all tokens for each new one.
    controls: what is shown in place of the frames, each for a score more.
    """

    name: str = MISSING
    path: str = MISSING
    samples: int = number(256, above=0)
    scores: str = choice("all", ("all", "likelihood"))
    controls: list[str] = choices(["blind"], CONTROLS)  # noqa: RUF009


@dataclass
class DataConfig:
    """Shards and batches. A global batch counts samples (conversations)."""

    name: str = "shards"
    root: str = ""  # a folder that the other paths of a preset refer to
    tokenizer: str = MISSING
    new_tokenizer: bool = False  # true: it may be another one than that of the weights of init_from
    sources: list[SourceConfig] = field(default_factory=list)
    eval_sources: list[SourceConfig] = field(default_factory=list)  # held out, for validation
    eval_samples: int = number(256, above=0)  # of each, its first ones
    samples: int | None = number(None, above=0)  # samples of the run; None: stage.samples
    global_batch: int = number(256, above=0)
    # A microbatch: as many samples, packed into one sequence, as these bounds allow, or one that is
    # larger by itself. None: PACKED_TOKENS, or sequence_length where that is more.
    max_tokens_per_batch: int | None = number(None, above=0)
    # None: PACKED_TILES / max_tiles, or stage.video_max_frames where that is more.
    max_frames_per_batch: int | None = number(None, above=0)
    micro_batch: int | None = number(None, above=0)  # samples; None: no bound
    max_tiles: int = number(1, above=0)
    sequence_length: int | None = number(None, above=1)  # None: stage.sequence_length
    # Threads of each video decoder; more help where there are more cores than workers.
    video_threads: int = number(1, above=0)
    # Loader processes for each data-parallel rank; 0: in the training process.
    workers: int = number(2, least=0, zero="no worker processes")
    # Samples of a source that are mixed with each other.
    shuffle_window: int = number(10_000, above=0)
    # Microbatches are padded to a multiple of this, in tokens.
    pad_multiple: int = number(64, above=0)
    # Stop when more than this share of the samples cannot be read.
    max_bad_ratio: float = number(0.01, least=0, most=1)
    stores: StoreOptions = field(default_factory=StoreOptions)  # how sources that are URLs are read
    audit: bool = False  # write the keys of every step to audit.RANK.jsonl

    def read_together(self, replicas: int) -> int:
        """Samples that a replica's loader gives at once: those of a microbatch, where these make up
        a step.
        """
        return math.gcd(self.micro_batch or 1, self.global_batch // replicas)


@dataclass
class MixtureConfig:
    """Share of each modality among a run's samples, in any unit, such as percent."""

    text: float = number(0.0, least=0)
    image: float = number(79.0, least=0)
    video: float = number(21.0, least=0)

    @property
    def shares(self) -> dict[str, float]:
        """The modalities that have a share, with it."""
        return {name: share for name, share in asdict(self).items() if share > 0}
