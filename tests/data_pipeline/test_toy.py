from __future__ import annotations

import io
import json
import math
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.schema import parse_sample
from data_pipeline.shards import ShardError, check_source
from data_pipeline.toy import captions, render
from data_pipeline.toy.__main__ import main
from data_pipeline.toy.build import MODALITIES, ToyConfig, build_toy, make_sample
from data_pipeline.toy.world import COLOURS, Event, Story, Thing, simulate
from data_pipeline.video import frames_at, probe_video

STORIES = [simulate(seed) for seed in range(150)]


def _thing(story: Story, frame: int, name: str) -> Thing:
    return next(t for t in story.frames[frame] if t.name == name)


def test_every_kind_of_event_happens() -> None:
    kinds = [event.kind for story in STORIES for event in story.events]
    assert {kind: kinds.count(kind) > 10 for kind in set(kinds)} == dict.fromkeys(
        ("appear", "leave", "change", "collide"), True
    )


def test_events_are_what_the_frames_show() -> None:
    for story in STORIES:
        for event in story.events:
            now, before = event.frame, event.frame - 1
            if event.kind == "appear":
                assert _thing(story, now, event.who).present
                assert not _thing(story, before, event.who).present
            elif event.kind == "leave":
                assert not _thing(story, now, event.who).present
                assert _thing(story, before, event.who).present
            elif event.kind == "change":
                shape = event.who.split()[1]
                assert _thing(story, before, event.who).shape == shape
                assert _thing(story, now, f"{event.other} {shape}").present
            else:
                a, b = (_thing(story, now, name) for name in (event.who, event.other))
                assert math.hypot(a.x - b.x, a.y - b.y) < a.radius + b.radius


def test_nothing_changes_without_an_event() -> None:
    for story in STORIES:
        told = {(e.frame, e.who) for e in story.events if e.kind != "collide"}
        for frame in range(1, len(story.frames)):
            for old, new in zip(story.frames[frame - 1], story.frames[frame], strict=True):
                changed = old.name != new.name or old.present != new.present
                assert changed == ((frame, old.name) in told)


def test_things_stay_in_the_box_unless_they_leave() -> None:
    for story in STORIES:
        for things in story.frames:
            for thing in things:
                if thing.present and not thing.leaving:
                    assert thing.radius - 1e-9 <= thing.x <= story.size - thing.radius + 1e-9
                    assert thing.radius - 1e-9 <= thing.y <= story.size - thing.radius + 1e-9


def test_the_same_seed_gives_the_same_story() -> None:
    assert simulate(5) == STORIES[5]
    assert simulate(5) != simulate(6)


def test_captions_say_what_happened() -> None:
    circle = Thing("circle", "red", 10, 10, 0, 0, 5)
    square = Thing("square", "orange", 50, 10, 0, 0, 5)
    story = Story(64, 8, [[circle, square]])
    story.events = [
        Event(3, "change", "red circle", "blue"),
        Event(5, "collide", "blue circle", "orange square"),
        Event(9, "collide", "blue circle", "orange square"),
        Event(12, "leave", "orange square"),
    ]
    assert captions.describe_still([square, circle]) == "A red circle and an orange square."
    assert captions.describe_story(story) == (
        "A red circle and an orange square move. The red circle turns blue. "
        "The blue circle and the orange square collide. The orange square leaves."
    )
    answers = dict(captions.ask_story(story, random.Random(i)) for i in range(200))
    assert answers["Which shapes collide?"] == "The blue circle and the orange square collide."
    assert answers["What appears?"] == "Nothing."
    assert answers["How many shapes are there at the start?"] == "Two."


def test_pictures_show_the_colours() -> None:
    thing = Thing("square", "green", 32, 32, 0, 0, 10)
    pixels = np.asarray(Image.open(io.BytesIO(render.jpeg([thing], 64))))
    assert np.abs(pixels[32, 32].astype(int) - COLOURS["green"]).max() < 12
    assert pixels[2, 2].max() < 40
    assert np.asarray(render.draw([thing], 64)).shape == (64, 64, 3)


def test_a_video_is_h264_with_a_frame_a_state() -> None:
    story = STORIES[0]
    data = render.mp4(story)
    info = probe_video(data)
    assert info.frames == len(story.frames) == 40
    assert info.duration == pytest.approx(5.0)
    frames = list(frames_at(data, [i / 8 for i in range(40)]))
    for shown, things in zip(frames, story.frames, strict=True):
        drawn = np.asarray(render.draw(things, 64)).transpose(2, 0, 1)
        assert np.abs(shown.numpy().astype(int) - drawn).mean() < 12
    assert render.mp4(story) == data


def test_a_set_has_every_source_split_and_count(toy: Path) -> None:
    for split, count in (("train", 48), ("heldout", 8)):
        for modality in MODALITIES:
            assert check_source(toy / split / modality).samples == count
    manifest = json.loads((toy / "toy.json").read_text())
    assert manifest["config"]["seed"] == 1
    assert manifest["sources"]["train/video"]["shards"] == 5


def test_all_samples_are_valid_and_splits_differ(toy: Path) -> None:
    videos: dict[str, set[bytes]] = {}
    for split in ("train", "heldout"):
        for shard in sorted((toy / split).glob("*/*.tar")):
            with tarfile.open(shard) as tar:
                for member in tar:
                    data = tar.extractfile(member).read()  # type: ignore[union-attr]
                    if member.name.endswith(".json"):
                        parse_sample(member.name, data)
                    elif member.name.endswith(".mp4"):
                        videos.setdefault(split, set()).add(data)
    assert len(videos["train"]) == 48
    assert not videos["train"] & videos["heldout"]


def test_a_sample_depends_on_its_number_alone() -> None:
    config = ToyConfig(seed=7)
    assert make_sample("video", "train", config, 3) == make_sample("video", "train", config, 3)
    assert make_sample("video", "train", config, 3) != make_sample("video", "heldout", config, 3)


def test_building_again_does_nothing_and_other_arguments_are_refused(toy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in toy.rglob("*")}
    config = ToyConfig(train=48, heldout=8, seed=1, samples_per_shard=10)
    build_toy(toy, config)
    assert {path: path.stat().st_mtime_ns for path in toy.rglob("*")} == before
    with pytest.raises(ShardError, match="other arguments"):
        build_toy(toy, ToyConfig(train=49, heldout=8, seed=1, samples_per_shard=10))


def test_a_build_that_was_killed_is_done_again(tmp_path: Path) -> None:
    arguments = [str(tmp_path), "--train", "4", "--heldout", "2", "--workers", "1"]
    assert main(arguments) == 0
    shard = tmp_path / "train" / "video" / "shard-000000.tar"
    whole = shard.read_bytes()
    (tmp_path / "toy.json").unlink()
    shard.rename(shard.with_name(shard.name + ".partial"))
    assert main(arguments) == 0
    assert shard.read_bytes() == whole


def test_a_wrong_number_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--size", "51"]) == 1
    assert "size: 51" in capsys.readouterr().err
