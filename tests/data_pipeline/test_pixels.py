"""A picture has one meaning: the table of pictures through every way into the model."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from av import VideoFrame
from PIL import Image

from data_pipeline.build import build_shards
from data_pipeline.images import decode_image, picture_pixels, read_picture
from data_pipeline.pixels import frame_pixels
from data_pipeline.schema import SampleError
from data_pipeline.video import frames_at
from inference.engine.images import as_picture
from inference.hf.processing_moss_video import _picture
from tests.data_pipeline.pictures import ARRAYS, PICTURES, Known
from tests.samples import imported

each = pytest.mark.parametrize("known", PICTURES, ids=lambda known: known.name)


def by_bytes(known: Known, _: Path) -> np.ndarray:
    return decode_image(known.data).permute(1, 2, 0).numpy()


def by_image(known: Known, _: Path) -> np.ndarray:
    return picture_pixels(Image.open(io.BytesIO(known.data))).permute(1, 2, 0).numpy()


def by_image_seen_before(known: Known, _: Path) -> np.ndarray:
    """Pillow forgets how the file is stored once it has decoded it."""
    image = Image.open(io.BytesIO(known.data))
    picture_pixels(image)
    return picture_pixels(image).permute(1, 2, 0).numpy()


def by_exported_processor(known: Known, folder: Path) -> np.ndarray:
    (folder / "picture").write_bytes(known.data)
    return np.asarray(_picture(folder / "picture"))


@each
@pytest.mark.parametrize("way", [by_bytes, by_image, by_image_seen_before, by_exported_processor])
def test_every_way_gives_the_same_pixels(way, known: Known, tmp_path: Path) -> None:
    if known.quarters is None:
        with pytest.raises((SampleError, ValueError), match=known.refusal):
            way(known, tmp_path)
    else:
        assert np.array_equal(way(known, tmp_path), known.pixels())


def test_the_importer_takes_and_refuses_the_same(tmp_path: Path) -> None:
    records = []
    for number, known in enumerate(PICTURES):
        (tmp_path / f"{number}.png").write_bytes(known.data)
        turns = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a"}]
        records.append({"messages": turns, "images": [f"{number}.png"]})
    (tmp_path / "a.json").write_text(json.dumps(records))
    build_shards(tmp_path / "a.json", tmp_path / "out")
    taken = imported(tmp_path / "out")
    lines = (tmp_path / "out/rejected.jsonl").read_text().splitlines()
    refused = {line["key"]: line for line in map(json.loads, lines)}
    for number, known in enumerate(PICTURES):
        key = f"a-{number:06d}"
        if known.quarters is None:
            assert refused[key]["reason"] == "undecodable_image"
            assert known.refusal in refused[key]["detail"]
        else:
            assert taken[key]["members"] == {"0.png": known.data}


@pytest.mark.parametrize("turn", [True, False])
def test_a_picture_given_by_hand_is_not_changed(turn: bool) -> None:
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    image.getexif()[0x0112] = 6 if turn else 1
    assert picture_pixels(image).unique().tolist() == [255]
    assert (image.size, image.mode, image.getpixel((0, 0))) == ((4, 2), "RGBA", (0, 0, 0, 0))


@pytest.mark.parametrize("way", [picture_pixels, read_picture, as_picture, _picture])
def test_every_way_takes_and_refuses_the_same_arrays(way: Callable[[Any], Any]) -> None:
    """Training and evaluation; the engine; the exported processor."""
    for array in ARRAYS:
        if array.pixels is None:
            with pytest.raises((SampleError, ValueError), match=array.refusal):
                way(array.given)
            continue
        made = way(array.given)
        pixels = np.asarray(made) if isinstance(made, Image.Image) else made.permute(1, 2, 0)
        assert np.array_equal(pixels, array.pixels), array.name


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.gif"])
def test_a_transparent_animation_is_on_white_as_its_pictures_are(tmp_path: Path, name: str) -> None:
    pictures = [Image.new("RGBA", (16, 16)) for _ in range(3)]  # of two libwebp drops alpha
    for i, picture in enumerate(pictures):
        picture.paste((255, 0, 0, 255), (8, 0, 16, 8 + i))
    kept: dict[str, Any] = {
        "a.webp": {"lossless": True, "exact": True}, "a.png": {}, "a.gif": {"disposal": 2},
    }  # fmt: skip
    pictures[0].save(
        tmp_path / name, save_all=True, append_images=pictures[1:], duration=500, **kept[name]
    )
    data = (tmp_path / name).read_bytes()
    for frame in (decode_image(data), *frames_at(data, [0.0, 1.0])):
        assert frame[:, 4, 4].tolist() == [255, 255, 255]
        assert frame[:, 4, 12].tolist() == [255, 0, 0]


@pytest.mark.parametrize("form", ["rgb24", "rgba", "ya8"])
def test_the_pixels_of_a_frame_can_be_written(form: str) -> None:
    """torch warns of arrays that cannot be."""
    stream = SimpleNamespace(sample_aspect_ratio=None)
    assert frame_pixels(VideoFrame(8, 4, form), stream).flags.writeable
