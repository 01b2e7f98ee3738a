"""One question to a trained model, about pictures, a clip or text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from data_pipeline.batch import IGNORED_LABEL, EncodedSample
from data_pipeline.images import read_picture, tile_into
from data_pipeline.prompts import PromptBuilder, PromptForm, as_typed
from data_pipeline.schema import IMAGE_MARK, VIDEO_MARK, Message
from data_pipeline.video import open_video, sample_times
from moss_train.evaluate.controls import Model
from moss_train.evaluate.generate import SPEAK, GeneratedConversation, generate, script_of

# A file's path or bytes, a PIL image, an array [H, W, 3], a tensor [3, H, W].
Image = str | Path | bytes | PIL.Image.Image | np.ndarray | torch.Tensor
Clip = str | Path | Sequence[Image]  # a file, or its frames


def answer(
    model: Model,
    prompt: str,
    images: Sequence[Image] = (),
    video: Clip | None = None,
    *,
    watched: bool = False,
    max_new_tokens: int = 64,
) -> str:
    """The most likely answer: see `TrainedModel.generate`.

    watched: the clip is a stream on which the model has said nothing before it is asked.
    """
    config, special = model.encoder.config, model.encoder.special
    prompts = PromptBuilder(model.tokenizer, special)
    pictures = [read_picture(image) for image in images]
    clip = [] if video is None else _frames(model, video)
    if watched and clip and not pictures:
        tokens = prompts.watched(len(clip), prompt)
    else:
        marks = IMAGE_MARK * len(pictures) + (VIDEO_MARK if clip else "")
        counts = [1] * len(pictures) + ([len(clip)] if clip else [])
        messages = [Message("user", marks + as_typed(prompt))]
        form: PromptForm = "pretrain" if config.prompt == "pretrain" else "chat"
        tokens = prompts.question(messages, counts, form).tokens
    sample = _encoded(model, tokens, [*pictures, *clip])
    (states,) = model.encode([sample])
    ends = {special.eot_id, special.end_of_text, special.silence}
    script = [*script_of(tokens, special.image), SPEAK]
    talk = GeneratedConversation(script, states, sample.aspect_ratio_ids, ends, max_new_tokens)
    generate(model, [talk])
    text: str = model.tokenizer.decode(talk.utterances[-1])
    return text


def _frames(model: Model, video: Clip) -> list[torch.Tensor]:
    """uint8 [3, H, W] each: all frames that are given, or those of a file that training takes."""
    if not isinstance(video, str | Path):
        return [read_picture(frame) for frame in video]
    config = model.encoder.config
    with open_video(Path(video).read_bytes()) as opened:
        times = sample_times(
            opened.info, config.video_fps, config.video_min_frames, config.video_max_frames
        )
        return list(opened.frames(times))


def _encoded(
    model: Model, tokens: Sequence[int], pictures: Sequence[torch.Tensor]
) -> EncodedSample:
    config = model.encoder.config
    tile, tiles = config.tile_size, config.max_tiles
    frames = torch.zeros(len(pictures), tiles, 3, tile, tile, dtype=torch.uint8)
    ratios = [tile_into(out, picture) for out, picture in zip(frames, pictures, strict=True)]
    row = torch.tensor(tokens)
    return EncodedSample(
        key="question",
        tokens=row,
        labels=torch.full_like(row, IGNORED_LABEL),
        frames=frames,
        frame_positions=(row == model.encoder.special.image).nonzero()[:, 0],
        aspect_ratio_ids=torch.tensor(ratios, dtype=torch.int64),
    )
