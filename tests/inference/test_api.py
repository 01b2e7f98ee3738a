"""The front door in Python: `inference.load`, questions, a video as events, a live session."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import inference
from inference import offline_infer, realtime_offline_infer, realtime_streaming_infer
from inference.export_info import ExportError
from inference.session.handle import SessionClosed
from inference.sources import SourceError
from tests.inference.tiny import save_tiny
from tests.samples import graded_video
from tests.torchrun import REPO
from tests.waiting import until

QUIET = inference.Sampling(silence_bias=4.0)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of four seconds, and a picture of noise."""
    folder = tmp_path_factory.mktemp("files")
    graded_video(folder / "clip.mp4", [i / 5 for i in range(20)])
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    return folder


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("sft"), moss_stage="sft")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("live"), moss_stage="realtime_sft")


@pytest.fixture(scope="module")
def watcher(live: Path) -> Iterator[inference.Model]:
    with inference.load(live, device="cpu", max_sessions=2) as model:
        yield model


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "numpy", "av")
    code = f"import sys, inference; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_exported_name_is_there() -> None:
    assert dir(inference) == inference.__all__
    for name in inference.__all__:
        assert callable(getattr(inference, name))
    with pytest.raises(AttributeError, match="'inference' has no attribute 'open'"):
        inference.open  # noqa: B018  # type: ignore[attr-defined]


def test_chat_says_what_the_command_says(
    sft: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, clip = str(files / "noise.png"), files / "clip.mp4"
    with inference.load(sft, device="cpu", dtype="fp32") as model:
        about_picture = model.chat("What is it?", images=[picture], max_new_tokens=6)
        pixels = np.array(Image.open(picture))
        assert model.chat("What is it?", images=[pixels], max_new_tokens=6) == about_picture
        about_clip = model.chat("What is it?", video=clip, fps=2.0, max_new_tokens=6)
        with pytest.raises(ValueError, match="not learned when to be silent: use chat"):
            model.watch(clip)
        with pytest.raises(ValueError, match=r"300 pictures and frames, .* window=256"):
            model.chat("What is it?", images=[pixels] * 300)
    command = ["--checkpoint", str(sft), "--device", "cpu", "--prompt", "What is it?"]
    for media, said in (
        (["--image_path", picture], about_picture),
        (["--video_path", str(clip), "--fps", "2"], about_clip),
    ):
        assert offline_infer.main([*command, *media, "--max_new_tokens", "6"]) == 0
        assert capsys.readouterr().out == said + "\n"
        assert said


def test_a_real_time_model_is_asked_about_a_whole_video(
    watcher: inference.Model, live: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = files / "clip.mp4"
    said = watcher.chat("What is it?", video=clip, system_prompt="Be short.", max_new_tokens=6)
    options = ["--video_path", str(clip), "--prompt", "What is it?", "--max_new_tokens", "6"]
    command = ["--checkpoint", str(live), "--device", "cpu", "--system_prompt", "Be short."]
    assert realtime_offline_infer.main([*command, *options]) == 0
    assert capsys.readouterr().out == said + "\n"


def test_watching_gives_the_events_of_the_command(
    watcher: inference.Model, live: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = files / "clip.mp4"
    ask = {"00:01.5": "Who?"}
    events = watcher.watch(clip, "Tell me.", ask, sampling=QUIET, pace=5, max_new_tokens=9)
    seen = list(events)
    options = ["--video_path", str(clip), "--speed", "0", "--pace", "5", "--max_new_tokens", "9"]
    asked = ["--prompt", "Tell me.", "--ask", "1.5:Who?", "--silence_bias", "4", "--jsonl", "-"]
    command = ["--checkpoint", str(live), "--device", "cpu"]
    assert realtime_streaming_infer.main([*command, *options, *asked]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ours, theirs = [(e.type, e.t_media) for e in seen], [(e["type"], e["t_media"]) for e in told]
    for events_of in (ours, theirs):  # how far a reader of files is ahead of the model is its own
        (ended,) = (event for event in events_of if event[0] == "source.ended")
        events_of.remove(ended)
    assert ours == theirs
    for kind, value in (("response.done", "text"), ("input_frame.processed", "decision")):
        values = [e.data[value] for e in seen if e.type == kind]
        assert values == [e[value] for e in told if e["type"] == kind] != []


def test_a_video_that_nobody_watches_to_its_end_frees_its_place(
    watcher: inference.Model, files: Path
) -> None:
    before = threading.active_count()
    for _ in range(3):  # more than there are places
        events = watcher.watch(files / "clip.mp4", speed=1, sampling=QUIET)
        assert next(events).type == "input_frame.processed"
        events.close()  # type: ignore[attr-defined]
    assert watcher.runner.sessions == 0
    assert threading.active_count() <= before + 3
    with pytest.raises(SourceError, match="there is no such file"):
        watcher.watch(files / "none.mp4")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"fps": float("nan")}, "fps=nan: must be a finite number, greater than 0"),
        ({"fps": 0}, "fps=0: must be greater than 0"),
        ({"max_frames": 0}, "max_frames=0: must be greater than 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5: must be a whole number, greater than 0"),
    ],
)
def test_numbers_out_of_range_are_refused(watcher, files: Path, wrong, says) -> None:
    with pytest.raises(ValueError, match=f"^{says}$"):
        watcher.chat("What is it?", video=files / "clip.mp4", **wrong)


def test_a_live_session_takes_frames_and_prompts(watcher: inference.Model, files: Path) -> None:
    picture = Image.open(files / "noise.png")
    with watcher.session("Tell me.", live=False, clock="media", sampling=QUIET) as session:
        session.put_frame(picture)
        session.put_prompt("What is it?")
        session.put_frame(np.array(picture))
        session.end()
        seen = list(session.events())
    frames = [e.data["frame_at"] for e in seen if e.type == "input_frame.processed"]
    assert frames == [0.0, 1.0]
    assert [e.data["text"] for e in seen if e.type == "conversation.item.created"] == [
        "What is it?"
    ]
    assert seen[-1].type == "session.closed"


def test_an_answer_that_is_cut_off_is_not_taken_for_a_whole_one(live: Path) -> None:
    talk = inference.Sampling(silence_bias=-100.0)
    with inference.load(live, device="cpu") as model:

        def close() -> None:
            running = model.runner._running
            until(lambda: any(one.task.stats.counts["tokens"] for one in list(running)))
            model.close()

        closing = threading.Thread(target=close)
        closing.start()
        with pytest.raises(SessionClosed, match="the runner was closed"):
            model.chat("Who?", sampling=talk, max_new_tokens=10**6)
        closing.join()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"ask": {"soon": "Who?"}}, "'soon' is not a time"),
        ({"ask": {-1: "Who?"}}, "-1 is not a time"),
        ({"speed": float("nan")}, "speed=nan"),
        ({"fps": 0}, "fps=0"),
        ({"reconnect": -1}, "reconnect=-1"),
    ],
)
def test_wrong_times_are_refused(
    watcher: inference.Model, files: Path, wrong: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        watcher.watch(files / "clip.mp4", **wrong)


def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, live: Path) -> None:
    with pytest.raises(ExportError, match="give the folder of an export"):
        inference.load(tmp_path)
    with pytest.raises(ValueError, match="dtype=half"):
        inference.load(live, device="cpu", dtype="half")
    with inference.load(live, device="cpu") as model:
        pass
    with pytest.raises(SessionClosed, match="closed"):
        model.chat("Who?")
