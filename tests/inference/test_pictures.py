"""A picture has one meaning: the table of pictures through every way into the engine and server."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.schema import SampleError
from inference.engine.images import as_picture, check_header, fit
from inference.engine.load import load_engine
from inference.export_info import ExportInfo
from inference.serve.chat import decode
from inference.serve.hub import Hub
from inference.serve.limits import Limits, Refused
from inference.serve.metrics import Metrics
from inference.serve.question import read_question
from inference.session.runner import Runner
from tests.data_pipeline.pictures import PICTURES, SIDE, Known
from tests.inference.serve.serving import data_url
from tests.inference.tiny import MEAN, STD

each = pytest.mark.parametrize("known", PICTURES, ids=lambda known: known.name)
Way = Callable[[Known], Tensor]


@pytest.fixture(scope="module")
def hub(tiny: Path) -> Iterator[Hub]:
    engine = load_engine(tiny, device="cpu", window=4, max_tokens=256)
    with Runner(engine) as runner:
        made = Hub(runner, Limits(), Metrics(), ExportInfo("chat", "sft"))
        yield made
        made.close_decoders()


def test_the_tile_is_the_tables_picture(hub: Hub) -> None:
    assert hub.runner.tile == SIDE  # so nothing is resized below


def ways(hub: Hub) -> dict[str, Way]:
    def pushed(given: Any) -> Tensor:
        return fit(as_picture(given), SIDE)  # what push_frame and put_frame do

    def encoded(known: Known) -> Tensor:
        (pixels,) = hub.runner.engine.pixels([Image.open(io.BytesIO(known.data))])
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
        return (pixels[0] * std + mean).mul(255).round().to(torch.uint8)

    def chat(known: Known) -> Tensor:
        part = {"type": "image_url", "image_url": {"url": data_url(known.data, "image/png")}}
        question = read_question({"messages": [{"role": "user", "content": [part]}]}, hub.limits)
        (frame,), _ = asyncio.run(decode(question.media, hub, hub.budget.share()))
        return frame

    return {
        "push_frame of bytes": lambda known: pushed(known.data),
        "push_frame of a PIL image": lambda known: pushed(Image.open(io.BytesIO(known.data))),
        "Engine.encode": encoded,
        "a socket's frame": lambda known: asyncio.run(hub.decode(known.data)),
        "image_url": chat,
    }


@each
def test_every_way_gives_the_same_pixels(hub: Hub, known: Known) -> None:
    for name, way in ways(hub).items():
        if known.quarters is None:
            with pytest.raises((SampleError, Refused), match=known.refusal):
                way(known)
        else:
            assert np.array_equal(way(known).permute(1, 2, 0).numpy(), known.pixels()), name


def test_a_frame_is_not_the_callers_memory() -> None:
    """A camera's program may write the next picture into the same array."""
    for given in (
        np.zeros((SIDE, SIDE, 3), np.uint8),
        torch.zeros(3, SIDE, SIDE, dtype=torch.uint8),
    ):
        frame = fit(as_picture(given), SIDE)
        given[:] = 255
        assert frame.max() == 0


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        (b"%PDF-1.7 ...", "PDF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x20ftypavif\0\0\0\0avifmif1", "an AVIF picture"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "an AVIF picture"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isommp41", "video"),
        (b"\x1aE\xdf\xa3" + b"\0" * 60, "video"),
        (b"no picture", "no picture in a format that is known"),
    ],
)
def test_what_is_no_picture_is_named(data: bytes, named: str) -> None:
    with pytest.raises(SampleError, match=named):
        check_header(data, 10**6, ("JPEG", "PNG"))


def test_a_picture_beyond_pillows_own_limit_is_told_ours() -> None:
    words = r"too_many_pixels: it has many more than 1000000$"
    with pytest.raises(SampleError, match=words):
        check_header(b"P6 20000 20000 255\n", 10**6)
