"""What files of an export repeat, since they import nothing of ours, is what the rest has."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

from data_pipeline import batch, clock, pixels, prompts, schema
from inference.engine import load
from inference.hf import (
    clock_moss_video,
    configuration_moss_video,
    model_moss_video,
    modeling_moss_video,
    pixels_moss_video,
    processing_moss_video,
    vision_moss_video,
)
from moss_train import hardware, model_config
from moss_train.model import vision


def text(module: ModuleType) -> str:
    return Path(str(module.__file__)).read_text()


def test_files_are_equal() -> None:
    assert text(pixels_moss_video) == text(pixels)
    assert text(clock_moss_video) == text(clock)


@pytest.mark.parametrize(
    "module",
    [configuration_moss_video, model_moss_video, modeling_moss_video, processing_moss_video],
)
def test_files_that_auto_classes_open_import_themselves_all_that_they_need(module) -> None:
    """transformers 4 copies no file of a local folder that only another one imports."""
    needed = {Path(file).stem for file in get_relative_import_files(module.__file__)}
    assert set(get_relative_imports(module.__file__)) == needed


def test_copies_are_equal() -> None:
    assert modeling_moss_video.IGNORED_LABEL == batch.IGNORED_LABEL == -100
    assert processing_moss_video.IMAGE == schema.IMAGE_MARK
    assert processing_moss_video.VIDEO == schema.VIDEO_MARK
    assert processing_moss_video.TYPED == prompts.TYPED
    assert vision_moss_video.PATCH_MULTIPLE == vision.PATCH_MULTIPLE
    assert configuration_moss_video.POOLS == model_config.POOLS


def test_the_engine_and_training_name_dtypes_alike() -> None:
    assert load.DTYPES == hardware.DTYPES
