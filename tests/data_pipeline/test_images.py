from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.images import decode_image, fit_size, supported_aspect_ratios, tile_image
from data_pipeline.schema import SampleError


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


@pytest.mark.parametrize("max_tiles", [1, 4])
@pytest.mark.parametrize("size", [(30, 40), (200, 100), (333, 77), (56, 56), (500, 700), (9, 300)])
def test_same_pixels_as_transformers(size: tuple[int, int], max_tiles: int) -> None:
    module = pytest.importorskip("transformers.models.mllama.image_processing_pil_mllama")
    processor = module.MllamaImageProcessorPil(
        size={"height": 56, "width": 56},
        max_image_tiles=max_tiles,
        do_normalize=False,
        do_rescale=False,
    )
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    theirs = processor.preprocess(Image.fromarray(noise), return_tensors="pt")
    image = torch.from_numpy(noise).permute(2, 0, 1)
    tiles, ratio = tile_image(image, 56, max_tiles)
    assert ratio == theirs["aspect_ratio_ids"].item()
    difference = tiles.float() - theirs["pixel_values"][0, 0].float()
    assert difference.abs().max().item() <= 1


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


@pytest.mark.parametrize("cut", [0, 10, 300])
def test_a_broken_picture_is_a_sample_error(cut: int) -> None:
    out = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(out, "JPEG")
    with pytest.raises(SampleError) as caught:
        decode_image(out.getvalue()[:cut])
    assert caught.value.reason == "undecodable_image"
