"""One raw sample of a shard to tensors: JSON -> frames -> prompt -> EncodedSample."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from data_pipeline.batch import EncodedSample
from data_pipeline.images import decode_image, tile_image
from data_pipeline.prompts import PromptBuilder, PromptForm
from data_pipeline.schema import Media, Sample, SampleError, parse_sample
from data_pipeline.tokens import SpecialTokens
from data_pipeline.video import frames_at, probe_video, sample_times

Tiled = tuple[Tensor, int]  # uint8 [T, 3, h, w] and the aspect ratio id


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
    prompt: Literal["pretrain", "chat"]
    swap_probability: float = 0.0  # of a real-time frame and the word before it, see prompts.py
    video_threads: int = 1  # of each decoder

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("tokenizer", "prompt", "swap_probability") and not value > 0:
                raise ValueError(f"{field.name}: {value!r}: must be greater than 0")
        if not 0 <= self.swap_probability <= 1:
            raise ValueError(
                f"swap_probability: {self.swap_probability!r}: must be between 0 and 1"
            )
        if self.prompt not in ("pretrain", "chat"):
            raise ValueError(f"prompt: {self.prompt!r}, allowed: pretrain, chat")
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

        `draws` decides what augmentation does; None: there is none, as in evaluation. Raises SampleError with the key and the reason for anything wrong with the data.
        """
        if "json" not in parts:
            raise SampleError("missing_json", f"members: {', '.join(sorted(parts))}", key)
        sample = parse_sample(key, parts["json"])
        try:
            return self._encode(sample, parts, draws)
        except SampleError as error:
            raise SampleError(error.reason, error.detail, key) from None

    def _encode(
        self, sample: Sample, parts: Mapping[str, bytes], draws: random.Random | None
    ) -> EncodedSample:
        form = self._form(sample)
        marks = self._frames_of_marks(sample, parts)
        prompt = self._prompts.build(
            sample.messages,
            [len(frames) for frames in marks],
            form=form,
            sequence_length=self.config.sequence_length,
            swap_probability=self.config.swap_probability,
            draws=draws,
        )
        frames = [frame for shown in marks for frame in shown][: len(prompt.frame_positions)]
        tile = self.config.tile_size
        empty = torch.zeros(0, self.config.max_tiles, 3, tile, tile, dtype=torch.uint8)
        return EncodedSample(
            key=sample.key,
            tokens=torch.tensor(prompt.tokens, dtype=torch.int64),
            labels=torch.tensor(prompt.labels, dtype=torch.int64),
            frames=torch.stack([pixels for pixels, _ in frames]) if frames else empty,
            frame_positions=torch.tensor(prompt.frame_positions, dtype=torch.int64),
            aspect_ratio_ids=torch.tensor([ratio for _, ratio in frames], dtype=torch.int64),
            truncated=prompt.truncated,
        )

    def _form(self, sample: Sample) -> PromptForm:
        if sample.kind != "realtime":
            return self.config.prompt
        if self.config.prompt == "pretrain":
            raise SampleError("wrong_kind", "a realtime sample cannot be a pretrain prompt")
        return "realtime"

    def _frames_of_marks(self, sample: Sample, parts: Mapping[str, bytes]) -> list[list[Tiled]]:
        """The frames of each mark in reading order."""
        owners = sample.mark_media()
        shown: list[list[Tiled]] = []
        for index, medium in enumerate(sample.media):
            if medium.file not in parts:
                raise SampleError("missing_media", f"{medium.file} is not in the shard")
            shown.append(self._tiles(sample, medium, owners.count(index), parts[medium.file]))
        if sample.kind != "realtime":
            return [shown[owner] for owner in owners]
        one_by_one = [iter(frames) for frames in shown]
        return [[next(one_by_one[owner])] for owner in owners]

    def _tiles(self, sample: Sample, medium: Media, marks: int, data: bytes) -> list[Tiled]:
        config = self.config
        if medium.type == "image":
            return [tile_image(decode_image(data), config.tile_size, config.max_tiles)]
        info = probe_video(data)
        if sample.kind == "realtime":
            times = list(medium.times or range(marks))
        else:
            times = sample_times(
                info, config.video_fps, config.video_min_frames, config.video_max_frames
            )
        frames = frames_at(data, times)
        return [tile_image(frame, config.tile_size, config.max_tiles) for frame in frames]
