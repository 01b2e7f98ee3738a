"""Writes a page of samples as the model sees them: tokens, labels, frames with their seconds."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipeline.atomic import write_atomically
from data_pipeline.batch import IGNORED_LABEL
from data_pipeline.encode import EncodeConfig, SampleEncoder
from data_pipeline.page import picture_url, render
from data_pipeline.schema import SampleError, parse_sample
from data_pipeline.tokens import build_toy_tokenizer, load_tokenizer
from tools.shards.encoding import frame_times
from tools.shards.find import StoredSample
from tools.shards.show import runs, untiled

_TURN = re.compile(r"<\|start_header_id\|>|<\|begin_of_text\|>")
_THUMB = 112  # pixels
_MOST = 600  # frames of a sample that are shown


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one kind: a `label` or `text` in words, or frames."""

    what: str
    text: str
    frames: Sequence[tuple[str, str]]  # picture, and its second and the number of its token


@dataclass(frozen=True)
class SampleView:
    title: str
    facts: str
    runs: Sequence[Run]


def write_page(
    path: Path,
    title: str,
    facts: Sequence[str],
    samples: Sequence[StoredSample],
    config: EncodeConfig,
    panels: dict[str, str] | None = None,
) -> None:
    """Encodes the samples and writes one file that needs no network."""
    encoder = SampleEncoder(config, load_tokenizer(config.tokenizer))
    shown = [_shown(stored, encoder) for stored in samples]
    page = render("samples.html.jinja", Path(__file__).parent, title=title, facts=facts,
                  samples=shown, panels=panels or {})  # fmt: skip
    write_atomically(path, page)


def toy_tokenizer(folder: Path, samples: Sequence[StoredSample]) -> str:
    """A small tokenizer made of the samples' own texts, for a page without one."""
    texts = [
        message["content"]
        for stored in samples
        for message in json.loads(stored.parts["json"])["messages"]
    ]
    build_toy_tokenizer(folder, texts, 2000)
    return str(folder)


def _shown(stored: StoredSample, encoder: SampleEncoder) -> SampleView:
    try:
        encoded = encoder.encode(stored.key, stored.parts)
    except SampleError as error:
        return SampleView(stored.key, f"{error.reason}: {error.detail}", ())
    sample = parse_sample(stored.key, stored.parts["json"])
    times = frame_times(sample, stored.parts, encoder.config)
    numbers = {position: n for n, position in enumerate(encoded.frame_positions.tolist())}
    tokenizer = load_tokenizer(encoder.config.tokenizer)
    tokens = encoded.tokens.tolist()
    made = []
    for what, places in runs(encoded):
        if what == "frame":
            frames = [
                (_picture(encoded, numbers[place]), _second(times[numbers[place]], place))
                for place in places if numbers[place] < _MOST
            ]  # fmt: skip
            made.append(Run(what, "", frames))
            continue
        text = tokenizer.decode([tokens[place] for place in places], skip_special_tokens=False)
        made.append(Run(what, _TURN.sub(lambda mark: f"\n{mark[0]}", text).lstrip("\n"), ()))
    labels = int((encoded.labels != IGNORED_LABEL).sum())
    facts = f"{sample.kind}, {len(tokens)} tokens, {labels} of them labels, {len(numbers)} frames"
    if encoded.truncated:
        facts += ", cut at sequence_length"
    return SampleView(stored.key, facts, made)


def _second(time: float | None, place: int) -> str:
    return f"@{place}" if time is None else f"{time:.1f} s @{place}"


def _picture(encoded: Any, number: int) -> str:
    pixels = untiled(encoded.frames[number], int(encoded.aspect_ratio_ids[number]))
    return picture_url(Image.fromarray(pixels.permute(1, 2, 0).numpy()), _THUMB)
