"""The encoder of a training stage, for looking at samples as they are trained on."""

from __future__ import annotations

from typing import Any

import yaml

from data_pipeline.encode import EncodeConfig, SampleEncoder
from data_pipeline.schema import Sample, member_named
from data_pipeline.tokens import load_tokenizer
from data_pipeline.video import probe_video, sample_times
from moss_train.presets import conf_dir


def stage_names() -> list[str]:
    return sorted(path.stem for path in (conf_dir() / "stage").glob("*.yaml"))


def stage_encoding(tokenizer: str, stage: str, tile_size: int, max_tiles: int) -> EncodeConfig:
    """The encoding of conf/stage/STAGE.yaml. ValueError: the stage is unknown."""
    path = conf_dir() / "stage" / f"{stage}.yaml"
    if not path.is_file():
        raise ValueError(f"--stage {stage}: choose one of {', '.join(stage_names())}")
    stage_fields: dict[str, Any] = yaml.safe_load(path.read_text())
    return EncodeConfig(
        tokenizer=tokenizer,
        sequence_length=stage_fields["sequence_length"],
        tile_size=tile_size,
        max_tiles=max_tiles,
        video_fps=stage_fields["video_fps"],
        video_min_frames=stage_fields["video_min_frames"],
        video_max_frames=stage_fields["video_max_frames"],
        prompt=stage_fields["prompt"],
    )


def open_encoder(config: EncodeConfig) -> SampleEncoder:
    return SampleEncoder(config, load_tokenizer(config.tokenizer))


def frame_times(
    sample: Sample, parts: dict[str, bytes], config: EncodeConfig
) -> list[float | None]:
    """The second of each frame in reading order; None for a picture."""
    owners = sample.mark_media()
    clips = {
        owner: iter(sample.media[owner].realtime_times(owners.count(owner)))
        for owner in owners
        if sample.kind == "realtime" and sample.media[owner].type == "video"
    }
    times: list[float | None] = []
    for owner in owners:
        if owner in clips:
            times.append(next(clips[owner]))
        elif sample.media[owner].type == "image":
            times.append(None)
        else:
            file = sample.media[owner].file
            info = probe_video(parts[member_named(file, parts) or file])
            times += sample_times(
                info, config.video_fps, config.video_min_frames, config.video_max_frames
            )
    return times
