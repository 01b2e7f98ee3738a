"""What files of an export repeat, since they import nothing of ours, is what the rest has."""

from __future__ import annotations

from data_pipeline import batch, schema, video
from inference.hf import (
    configuration_moss_video,
    modeling_moss_video,
    processing_moss_video,
    vision_moss_video,
)
from moss_train import config
from moss_train.model import vision


def test_copies_are_equal() -> None:
    assert modeling_moss_video.IGNORED_LABEL == batch.IGNORED_LABEL == -100
    assert processing_moss_video.IMAGE == schema.IMAGE_MARK
    assert processing_moss_video.VIDEO == schema.VIDEO_MARK
    assert processing_moss_video.EPSILON == video.EPSILON
    assert vision_moss_video.PATCH_MULTIPLE == vision.PATCH_MULTIPLE
    assert configuration_moss_video.POOLS == config.POOLS
