"""One raw sample of a shard to tensors: JSON -> frames -> prompt -> EncodedSample."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import get_args

import torch
from tokenizers import Tokenizer
from torch import Tensor

from data_pipeline.batch import EncodedSample, Unlearned
from data_pipeline.images import decode_image, tile_into
from data_pipeline.prompts import Prompt, PromptBuilder, PromptForm
from data_pipeline.schema import (
    Media,
    Sample,
    SampleError,
    described_by,
    member_named,
    parse_sample,
)
from data_pipeline.tokens import SpecialTokens
from data_pipeline.video import open_video, sample_times


@dataclass(frozen=True)
class _MediumFrames:
    """The frames of a medium of a sample: how many, and the first of them, decoded on demand."""

    count: int
    first: Callable[[int], Iterator[Tensor]]  # number of frames -> uint8 [3, H, W] of each


@dataclass(frozen=True)
class EncodeConfig:
    """How samples become tensors. Wrong values raise ValueError that names the field."""

    tokenizer: str  # folder with tokenizer.json
    sequence_length: int  # tokens
    tile_size: int  # pixels
    max_tiles: int  # tiles a frame
    video_fps: float
    video_min_frames: int
    video_max_frames: int
    prompt: PromptForm  # realtime: as chat, with streams among the samples
    swap_probability: float = 0.0  # that a real-time frame and the word before it swap
    video_threads: int = 1  # threads of a decoder

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("tokenizer", "prompt", "swap_probability") and not value > 0:
                raise ValueError(f"{field.name}: {value!r}: must be greater than 0")
        if not 0 <= self.swap_probability <= 1:
            raise ValueError(
                f"swap_probability: {self.swap_probability!r}: must be between 0 and 1"
            )
        if self.prompt not in get_args(PromptForm):
            allowed = ", ".join(get_args(PromptForm))
            raise ValueError(f"prompt: {self.prompt!r}, allowed: {allowed}")
        if self.video_min_frames > self.video_max_frames:
            raise ValueError(
                f"video_min_frames: {self.video_min_frames} is more than "
                f"video_max_frames ({self.video_max_frames})"
            )


class SampleEncoder:
    """Turns the members of one sample into tensors; keeps no state."""

    def __init__(self, config: EncodeConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        self.special = SpecialTokens.from_tokenizer(tokenizer, config.tokenizer)
        self._prompts = PromptBuilder(tokenizer, self.special)

    def encode(
        self, key: str, parts: Mapping[str, bytes], draws: random.Random | None = None
    ) -> EncodedSample:
        """`parts` maps member names without the key (`json`, `0.jpg`, ...) to their bytes.

        `draws` decides what augmentation does; None: there is none, as in evaluation. Raises
        SampleError with the key and the reason where something is wrong with the data.
        """
        sample = parse_sample(key, described_by(key, parts))
        try:
            return self._encode(sample, parts, draws)
        except SampleError as error:
            raise SampleError(error.reason, error.detail, key) from None

    def _encode(
        self, sample: Sample, parts: Mapping[str, bytes], draws: random.Random | None
    ) -> EncodedSample:
        form = self._form(sample)
        owners = sample.mark_media()
        with ExitStack() as files:
            media = [
                self._open(sample, medium, owners.count(index), parts, files)
                for index, medium in enumerate(sample.media)
            ]
            # A mark of a real-time clip is one of its frames, another mark all of its medium's.
            counts = [1 if form == "realtime" else media[owner].count for owner in owners]
            prompt = self._prompts.build(
                sample.messages,
                counts,
                form=form,
                sequence_length=self.config.sequence_length,
                swap_probability=self.config.swap_probability,
                draws=draws,
            )
            sources = [
                owner for owner, count in zip(owners, counts, strict=True) for _ in range(count)
            ]
            frames, ratios = self._tiles(media, sources[: len(prompt.frame_positions)])
        return EncodedSample(
            key=sample.key,
            tokens=torch.tensor(prompt.tokens, dtype=torch.int64),
            labels=torch.tensor(prompt.labels, dtype=torch.int64),
            frames=frames,
            frame_positions=torch.tensor(prompt.frame_positions, dtype=torch.int64),
            aspect_ratio_ids=torch.tensor(ratios, dtype=torch.int64),
            unlearned=_unlearned(sample, prompt),
        )

    def _form(self, sample: Sample) -> PromptForm:
        if sample.kind != "realtime":
            return "pretrain" if self.config.prompt == "pretrain" else "chat"
        if self.config.prompt == "pretrain":
            raise SampleError("wrong_kind", "a realtime sample cannot be a pretrain prompt")
        return "realtime"

    def _open(
        self,
        sample: Sample,
        medium: Media,
        marks: int,
        parts: Mapping[str, bytes],
        files: ExitStack,
    ) -> _MediumFrames:
        name = member_named(medium.file, parts)
        if name is None:
            raise SampleError("missing_media", f"{medium.file} is not in the shard")
        data, config = parts[name], self.config
        if medium.type == "image":
            return _MediumFrames(1, lambda count: (decode_image(data) for _ in range(count)))
        video = files.enter_context(open_video(data, config.video_threads))
        if sample.kind == "realtime":
            times = medium.realtime_times(marks)
        else:
            times = sample_times(
                video.info, config.video_fps, config.video_min_frames, config.video_max_frames
            )
        return _MediumFrames(len(times), lambda count: video.frames(times[:count]))

    def _tiles(
        self, media: Sequence[_MediumFrames], sources: Sequence[int]
    ) -> tuple[Tensor, list[int]]:
        """The tiles [F, T, 3, h, w] and ratio ids of frames, given the medium of each."""
        tile, tiles = self.config.tile_size, self.config.max_tiles
        frames = torch.zeros(len(sources), tiles, 3, tile, tile, dtype=torch.uint8)
        following = [shown.first(sources.count(index)) for index, shown in enumerate(media)]
        ratios = []
        for out, source in zip(frames, sources, strict=True):
            ratios.append(tile_into(out, next(following[source])))
        return frames, ratios


def _unlearned(sample: Sample, prompt: Prompt) -> Unlearned:
    learns = [message.learn for message in sample.messages if message.role == "assistant"]
    return Unlearned(
        int(prompt.truncated), prompt.truncated_labels, len(learns), learns.count(False)
    )
