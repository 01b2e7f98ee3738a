from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from data_pipeline.aspect_ratios import supported_aspect_ratios
from data_pipeline.images import (
    choose_grid,
    decode_image,
    fit_size,
    tile_image,
)
from data_pipeline.schema import SampleError
from moss_train.model.normalize import normalize
from moss_train.model_config import VisionConfig
from tests.data_pipeline.conftest import REAL_FILES


def test_the_ids_of_llamas_eight_ratios() -> None:
    assert supported_aspect_ratios(4) == (
        (1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1),
    )  # fmt: skip
    assert supported_aspect_ratios(1) == ((1, 1),)


def test_one_tile_keeps_the_ratio_and_pads_below() -> None:
    image = torch.full((3, 20, 40), 200, dtype=torch.uint8)
    tiles, ratio = tile_image(image, 56, 1)
    assert (tiles.shape, ratio) == ((1, 3, 56, 56), 1)
    assert tiles[0, :, :28].unique().tolist() == [200]
    assert tiles[0, :, 28:].unique().tolist() == [0]


def test_tiles_are_cut_row_by_row() -> None:
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    image[0] = torch.arange(4).view(2, 2).repeat_interleave(8, 0).repeat_interleave(8, 1)
    tiles, ratio = tile_image(image, 8, 4)
    assert ratio == 6
    assert [tile[0].unique().tolist() for tile in tiles] == [[0], [1], [2], [3]]


def pictures(real_files: Path | None) -> dict[str, np.ndarray]:
    """[H, W, 3] uint8: what resizing finds hard, and photographs where they are at hand."""
    random = np.random.default_rng(0)
    rows, columns = np.indices((301, 517))
    board = ((rows + columns) % 2 * 255).astype(np.uint8)
    made = {
        "noise": random.integers(0, 256, (333, 777, 3), dtype=np.uint8),
        "checkerboard": np.stack([board, 255 - board, board], axis=2),
        "stripes": np.repeat(np.where(columns // 3 % 2, 250, 3)[..., None], 3, 2).astype(np.uint8),
        "ramp": np.linspace(0, 255, 64 * 90 * 3).reshape(64, 90, 3).astype(np.uint8),
        "tall": random.integers(0, 256, (1999, 31, 3), dtype=np.uint8),
        "wide": random.integers(0, 256, (9, 1300, 3), dtype=np.uint8),
        "dot": np.full((1, 1, 3), 77, np.uint8),
        "as large as a tile": random.integers(0, 256, (56, 56, 3), dtype=np.uint8),
        "as large as a canvas": random.integers(0, 256, (112, 112, 3), dtype=np.uint8),
    }
    if real_files is not None:
        for path in real_files.glob("*.jpg"):
            made[path.name] = np.asarray(Image.open(path).convert("RGB"))
    return made


@pytest.mark.parametrize("max_tiles", [1, 2, 4, 6])
def test_same_pixels_as_transformers(max_tiles: int) -> None:
    """To one step of 255, for pictures of all kinds; normalized, to what that step becomes."""
    module = pytest.importorskip("transformers.models.mllama.image_processing_pil_mllama")
    size = {"height": 56, "width": 56}
    processor = module.MllamaImageProcessorPil(
        size=size, max_image_tiles=max_tiles, image_mean=OPENAI_CLIP_MEAN, image_std=OPENAI_CLIP_STD
    )
    vision = VisionConfig(image_size=56, max_tiles=max_tiles)
    real_files = REAL_FILES if REAL_FILES.is_dir() else None
    for name, picture in pictures(real_files).items():
        theirs = processor.preprocess(Image.fromarray(picture), return_tensors="pt")
        raw = processor.preprocess(
            Image.fromarray(picture), return_tensors="pt", do_normalize=False, do_rescale=False
        )
        tiles, ratio = tile_image(torch.tensor(picture).permute(2, 0, 1), 56, max_tiles)
        assert ratio == theirs["aspect_ratio_ids"].item(), name
        off = (tiles.float() - raw["pixel_values"][0, 0].float()).abs()
        assert off.max().item() <= 1, name
        used = int(theirs["aspect_ratio_mask"][0, 0].sum())
        pixels = normalize(tiles[None], torch.tensor([ratio]), vision, torch.float32)[0, :used]
        step = torch.tensor([1 / 255 / deviation for deviation in OPENAI_CLIP_STD]).view(3, 1, 1)
        off = (pixels - theirs["pixel_values"][0, 0, :used]).abs()
        assert (off <= step + 1e-5).all(), name


@pytest.mark.parametrize("tile", [56, 560])
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 6))
def test_same_grid_and_size_as_transformers(
    tile: int, height: int, width: int, max_tiles: int
) -> None:
    module = pytest.importorskip("transformers.models.mllama.image_processing_pil_mllama")
    canvas = module.get_optimal_tiled_canvas(height, width, max_tiles, tile)
    grid = choose_grid(height, width, tile, max_tiles)
    assert [side * tile for side in grid] == list(canvas)
    assert fit_size(height, width, grid, tile) == module.get_image_size_fit_to_canvas(
        height, width, *canvas, tile
    )


def test_a_tiny_side_does_not_vanish() -> None:
    assert fit_size(1, 1000, (1, 1), 56) == (1, 56)


def test_pictures_come_out_upright_and_on_white() -> None:
    lying = Image.new("RGB", (20, 10), "red")
    exif = lying.getexif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    out = io.BytesIO()
    lying.save(out, "JPEG", exif=exif)
    assert decode_image(out.getvalue()).shape == (3, 20, 10)
    out = io.BytesIO()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(out, "PNG")
    assert decode_image(out.getvalue()).unique().tolist() == [255]


@pytest.mark.parametrize(("width", "height"), [(61, 47), (2600, 2000)])
def test_pixels_are_pil_s_in_its_own_memory_and_in_a_copy(width: int, height: int) -> None:
    """The larger picture does not lie in one piece."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    decoded = decode_image(out.getvalue())
    assert decoded.stride(2) == (3 if width == 2600 else 4)
    wanted = torch.tensor(pixels).permute(2, 0, 1)
    assert torch.equal(decoded, wanted)
    got, _ = tile_image(decoded, 56, 1)
    assert torch.equal(got, tile_image(wanted.contiguous(), 56, 1)[0])


@pytest.mark.parametrize("cut", [0, 10, 300])
def test_a_broken_picture_is_a_sample_error(cut: int) -> None:
    out = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(out, "JPEG")
    with pytest.raises(SampleError) as caught:
        decode_image(out.getvalue()[:cut])
    assert caught.value.reason == "undecodable_image"
