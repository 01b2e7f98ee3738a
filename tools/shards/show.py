"""`show`: prints the prompt of a sample with its labels, and draws its frames."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer
from torch import Tensor

from data_pipeline.aspect_ratios import supported_aspect_ratios
from data_pipeline.batch import IGNORED_LABEL, EncodedSample
from data_pipeline.encode import EncodeConfig
from data_pipeline.schema import parse_sample
from data_pipeline.tokens import load_tokenizer
from tools.shards.encoding import frame_times, open_encoder
from tools.shards.find import StoredSample

_COLORS = {"label": "\x1b[32m", "frame": "\x1b[36m", "role": "\x1b[1m"}
_PLAIN = "\x1b[0m"
_HEADER = re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n\n")
_THUMB, _COLUMNS, _TEXT = 224, 6, 18  # pixels, frames a row, pixels


@dataclass(frozen=True)
class Frame:
    """Where a frame stands in the prompt, and when it was on screen (None: a picture)."""

    position: int
    seconds: float | None

    def __str__(self) -> str:
        return (
            f"@{self.position}" if self.seconds is None else f"{self.seconds:.1f}s @{self.position}"
        )


def show_sample(
    stored: StoredSample, config: EncodeConfig, *, color: bool, sheet: Path | None
) -> str:
    """The text to print; `sheet`: PNG of the frames to write. SampleError for a bad sample."""
    encoded = open_encoder(config).encode(stored.key, stored.parts)
    sample = parse_sample(stored.key, stored.parts["json"])
    positions = encoded.frame_positions.tolist()
    times = frame_times(sample, stored.parts, config)[: len(positions)]
    frames = [Frame(p, t) for p, t in zip(positions, times, strict=True)]
    origin = json.loads(stored.parts["json"]).get("origin")
    labels = int((encoded.labels != IGNORED_LABEL).sum())
    lines = [
        f"{stored.key} ({stored.shard.name}), {sample.kind}"
        + (f", from {origin}" if origin else ""),
        f"{len(encoded.tokens)} tokens, {labels} of them labels "
        f"({_painted('green', 'label', color) if color else 'between « and »'}), "
        f"{len(frames)} frames" + (", cut at sequence_length" if encoded.truncated else ""),
        "".join(_prompt(encoded, frames, load_tokenizer(config.tokenizer), color)).strip(),
    ]
    if frames and sheet is not None:
        contact_sheet(encoded, frames).save(sheet)
        lines.append(f"frames: {sheet}")
    return "\n".join(lines)


def _prompt(
    encoded: EncodedSample, frames: list[Frame], tokenizer: Tokenizer, color: bool
) -> Iterator[str]:
    numbers = {frame.position: number for number, frame in enumerate(frames)}
    tokens = encoded.tokens.tolist()
    for what, places in runs(encoded):
        if what == "frame":
            yield _painted(_frames([numbers[p] for p in places], frames), "frame", color)
            continue
        text = tokenizer.decode([tokens[p] for p in places], skip_special_tokens=False)
        if what == "label":
            yield _painted(text, "label", color) if color else f"«{text}»"
        else:
            yield _HEADER.sub(lambda m: f"\n{_painted(m[1], 'role', color)}: ", text)


def runs(encoded: EncodedSample) -> Iterator[tuple[str, list[int]]]:
    """Neighbouring positions of one kind: `frame`, `label` or `text`."""
    frames = set(encoded.frame_positions.tolist())
    has_label = (encoded.labels != IGNORED_LABEL).tolist()

    def sort(position: int) -> str:
        return "frame" if position in frames else "label" if has_label[position] else "text"

    for what, run in groupby(range(len(has_label)), sort):
        yield what, list(run)


def _painted(text: str, what: str, color: bool) -> str:
    return f"{_COLORS[what]}{text}{_PLAIN}" if color else text


def _frames(numbers: list[int], frames: list[Frame]) -> str:
    """A mark such as `[0 | 0.0s @5]` for each frame; of more than eight the first and the last."""
    if len(numbers) > 8:
        first, last = numbers[0], numbers[-1]
        return f"[{first} | {frames[first]}]...[{last} | {frames[last]}]"
    return "".join(f"[{number} | {frames[number]}]" for number in numbers)


def contact_sheet(encoded: EncodedSample, frames: list[Frame]) -> Image.Image:
    """A picture of all frames as the model gets them, with their numbers, times and token
    positions."""
    rows = -(-len(frames) // _COLUMNS)
    columns = min(len(frames), _COLUMNS)
    sheet = Image.new("RGB", (columns * _THUMB, rows * (_THUMB + _TEXT)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, frame in enumerate(frames):
        left = number % _COLUMNS * _THUMB
        top = number // _COLUMNS * (_THUMB + _TEXT)
        ratio = int(encoded.aspect_ratio_ids[number])
        picture = Image.fromarray(untiled(encoded.frames[number], ratio).permute(1, 2, 0).numpy())
        picture.thumbnail((_THUMB, _THUMB))
        sheet.paste(picture, (left, top))
        draw.text((left + 3, top + _THUMB + 1), f"{number} | {frame}", "black", font)
    return sheet


def untiled(tiles: Tensor, aspect_ratio_id: int) -> Tensor:
    """The canvas that was cut into tiles: uint8 [T, 3, h, w] -> uint8 [3, high h, wide w]."""
    high, wide = supported_aspect_ratios(len(tiles))[aspect_ratio_id - 1]
    grid = tiles[: high * wide].unflatten(0, (high, wide))
    return torch.cat([torch.cat(list(row), dim=-1) for row in grid], dim=-2)
