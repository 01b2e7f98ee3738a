"""The toy world as files: what pictures and clips show, what a set holds, how it is built."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from data_pipeline.schema import parse_sample
from data_pipeline.shards import ShardError, check_source
from data_pipeline.toy import render
from data_pipeline.toy.__main__ import main
from data_pipeline.toy.build import (
    MODALITIES,
    STAGES,
    ToyConfig,
    build_toy,
    make_sample,
)
from data_pipeline.toy.world import COLOURS, PLACES, Thing, simulate
from data_pipeline.video import frames_at, probe_video
from tests.moss_train.train.runs import is_running
from tests.torchrun import REPO
from tests.waiting import until


def test_pictures_of_a_story_are_told_one_by_one() -> None:
    """What is said after each picture is what its pixels show."""
    told: list[str] = []
    for index in range(60):
        sample = make_sample("pt1/train/image", ToyConfig(), index)
        first, *later = sample["json"]["messages"][1]["content"].split("<|image|>")[1:] or [""]
        if not later:
            continue
        shown = [places(sample[media["file"]]) for media in sample["json"]["media"]]
        things = re.findall(r"The \w+ is (\w+), (\w+ \w+)\.", first)
        assert {PLACES.index(place): colour for colour, place in things}.items() <= shown[0].items()
        for words, (before, after) in zip(later, pairwise(shown), strict=True):
            assert is_told(words.rstrip(".").split(), before, after), words
        told += [words.split()[-1] if "new" in words else words.split()[3] for words in later]
    assert len(told) > 50
    assert set(told) >= {"new.", "turns", "moves"}


def places(picture: bytes) -> dict[int, str]:
    """The colours in a picture by the place where they are."""
    pixels = np.asarray(Image.open(io.BytesIO(picture)), dtype=float)
    found = {}
    for place in range(4):
        seen = pixels[14 + 28 * (place // 2), 14 + 28 * (place % 2)]
        off = {name: float(np.abs(seen - COLOURS[name]).sum()) for name in COLOURS}
        nearest = min(off, key=lambda name: off[name])
        if off[nearest] < 70:
            found[place] = nearest
    return found


def is_told(words: list[str], before: dict[int, str], after: dict[int, str]) -> bool:
    """Whether the words say how one picture became the next."""
    if words == ["Nothing", "new"]:
        return before == after
    _, colour, _, verb, *to = words
    place = {colour: place for place, colour in {**after, **before}.items()}[colour]
    if verb == "comes":
        return {**before, place: colour} == after and place not in before
    rest = {at: other for at, other in before.items() if at != place}
    if verb == "turns":
        return {**rest, place: to[0]} == after
    step = {"right": 1, "left": -1, "down": 2, "up": -2, "": 0}["".join(to)]
    return rest == after if verb == "leaves" else {**rest, place + step: colour} == after


def test_only_training_asks_several_questions() -> None:
    for modality in MODALITIES:
        made = [
            make_sample(f"sft/{split}/{modality}", ToyConfig(), index)["json"]
            for split in ("train", "heldout") for index in range(40)
        ]  # fmt: skip
        turns = [len(data["messages"]) // 2 for data in made]
        assert max(turns[:40]) >= 3
        assert set(turns[40:]) == {1}


def test_pictures_show_the_colours() -> None:
    thing = Thing("square", "green", 3, 0.15, 0, 0)
    pixels = np.asarray(Image.open(io.BytesIO(render.jpeg((thing,), 64))))
    assert pixels.shape == (64, 64, 3)
    assert np.abs(pixels[48, 48].astype(int) - COLOURS["green"]).max() < 12
    assert pixels[16, 16].max() < 40


def test_a_video_is_h264_and_shows_each_state_at_its_second() -> None:
    story = simulate(0, seconds=8, events=3)
    data = render.mp4(story, size=56, fps=4)
    info = probe_video(data)
    assert info.frames == 32
    assert info.duration == pytest.approx(8.0)
    frames = list(frames_at(data, list(range(8))))
    for shown, state in zip(frames, story.states, strict=True):
        drawn = pixels(render.draw(state, 56))
        assert np.abs(shown.numpy() - drawn).mean() < 8
        for thing in state:
            x, y = (round(56 * part) for part in thing.centre)
            assert np.abs(shown[:, y, x].numpy() - COLOURS[thing.colour]).max() < 60
    assert render.mp4(story, size=56, fps=4) == data


def test_a_frame_shows_its_second_alone_and_a_change_between_two_seconds_only() -> None:
    """No frame of a whole second differs from a picture of its state, whatever was before."""
    moves = 0
    for seed in range(12):
        story = simulate(seed, seconds=5, events=2)
        frames = list(frames_at(render.mp4(story, 56, 2), [i / 2 for i in range(10)]))
        for second, state in enumerate(story.states):
            shown = frames[2 * second].numpy()
            assert np.abs(shown - pixels(render.draw(state, 56))).mean() < 6
            assert np.abs(np.median(shown, axis=(1, 2)) - render.BACKGROUND).max() < 12
        for second in (event.second for event in story.events if event.kind == "move"):
            halfway = frames[2 * second - 1].numpy()
            for state in story.states[second - 1 : second + 1]:
                assert np.abs(halfway - pixels(render.draw(state, 56))).mean() > 6
            moves += 1
    assert moves > 5


def pixels(drawn: Image.Image) -> np.ndarray:
    """`[3, h, w]`, as frames are decoded, in integers that may be subtracted."""
    return np.asarray(drawn).transpose(2, 0, 1).astype(int)


def test_a_set_has_every_source_split_and_count(toy: Path) -> None:
    for split, count in (("train", 48), ("heldout", 8)):
        for modality in MODALITIES:
            assert check_source(toy / "sft" / split / modality).samples == count
    manifest = json.loads((toy / "toy.json").read_text())
    assert manifest["config"]["seed"] == 1
    assert manifest["sources"]["sft/train/video"]["shards"] == 5


def test_all_samples_are_valid_and_splits_differ(toy: Path) -> None:
    videos: dict[str, set[bytes]] = {}
    for split in ("train", "heldout"):
        for shard in sorted((toy / "sft" / split).glob("*/*.tar")):
            with tarfile.open(shard) as tar:
                for member in tar:
                    data = tar.extractfile(member).read()  # type: ignore[union-attr]
                    if member.name.endswith(".json"):
                        parse_sample(member.name, data)
                    elif member.name.endswith(".mp4"):
                        videos.setdefault(split, set()).add(data)
    assert len(videos["train"]) == 48
    assert not videos["train"] & videos["heldout"]


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_has_its_samples(stage: str) -> None:
    kinds: dict[str, set[Any]] = {}
    for modality in MODALITIES:
        for index in range(20):
            data = make_sample(f"{stage}/train/{modality}", ToyConfig(), index)["json"]
            kinds.setdefault(modality, set()).add(parse_sample("key", data).kind)
    one = {"caption" if stage[:2] == "pt" else "chat"}
    of_video = {"chat", "realtime"} if stage == "realtime_sft" else one
    assert kinds == {"text": one, "image": one, "video": of_video}


def test_a_sample_depends_on_its_number_alone() -> None:
    config = ToyConfig(seed=7)
    first = make_sample("sft/train/video", config, 3)
    assert make_sample("sft/train/video", config, 3) == first
    for other in ("sft/heldout/video", "pt2/train/video"):
        assert make_sample(other, config, 3)["0.mp4"] != first["0.mp4"]


def test_building_again_does_nothing_and_other_arguments_are_refused(toy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in toy.rglob("*")}
    config = ToyConfig(train=48, heldout=8, seed=1, samples_per_shard=10, stages=("sft",))
    build_toy(toy, config)
    assert {path: path.stat().st_mtime_ns for path in toy.rglob("*")} == before
    with pytest.raises(ShardError, match="other arguments"):
        build_toy(toy, ToyConfig(train=49, heldout=8, seed=1, samples_per_shard=10))


def test_a_build_that_was_killed_is_done_again(tmp_path: Path) -> None:
    arguments = [str(tmp_path), "--train", "4", "--heldout", "2", "--workers", "1"]
    arguments += ["--stages", "pt1"]
    assert main(arguments) == 0
    shard = tmp_path / "pt1" / "train" / "video" / "shard-000000.tar"
    whole = shard.read_bytes()
    (tmp_path / "toy.json").unlink()
    shard.rename(shard.with_name(shard.name + ".partial"))
    assert main(arguments) == 0
    assert shard.read_bytes() == whole


def test_a_wrong_argument_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--size", "51"]) == 2
    assert capsys.readouterr().err == (
        "python -m data_pipeline.toy: error: size: 51: must be even, H.264 needs it\n"
    )
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), "--stages", "pt3"])
    said = capsys.readouterr().err
    assert "error: argument --stages: invalid choice: 'pt3' (choose from 'pt1'" in said


def test_a_killed_build_leaves_no_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data_pipeline.toy", str(tmp_path / "out")]
    build = subprocess.Popen(command, cwd=REPO)
    process = psutil.Process(build.pid)
    until(lambda: len(process.children()) == 2)
    workers = [worker.pid for worker in process.children()]
    until(lambda: any((tmp_path / "out").rglob("*.partial")))  # they have made the first samples
    build.kill()
    build.wait()
    until(lambda: not any(map(is_running, workers)))
