"""Fields that mean something in one form, in records of another: these stay what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.importers.published import looks_like_moments
from data_pipeline.strict_json import loads
from data_pipeline.video import probe_video
from tests.data_pipeline.importers.realtime import FRAME, run, said, write
from tests.samples import write_tar


def chat(*times: Any, mark: str = "<video>", **fields: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"{mark}?"}, {"role": "assistant", "content": "x"}]
    timed = [turn | {"timestamp": time} for turn, time in zip(turns, times, strict=True)]
    return {"messages": timed, **fields}


@pytest.mark.parametrize(
    ("record", "media"),
    [
        (chat("2023-01-01T10:00:00Z", "2023-01-01T10:00:05Z", video="a.mp4"), 1),
        (chat("1690000000", "1690000005", video="a.mp4"), 1),
        (chat(1690000000123, 1690000005123, video="a.mp4"), 1),
        (chat(0, 0, video="a.mp4"), 1),
        (chat(1, 2, mark="", path="logs/chat.json"), 0),  # seconds that answers took, say
        (chat(1, 2, mark="<video><video>", videos=["a.mp4", "a.mp4"]), 2),
        (chat(1, 2, mark="<image>", image="1.png", video_id="a"), 1),
        (chat(1, 2, video="a.mp4", tools=[{"name": "f"}]), 1),
    ],
)
def test_chats_whose_messages_have_times_of_another_kind_are_chats(
    record: dict[str, Any], media: int, folder: Path
) -> None:
    """They became streams of one clip: rejected, said at a wrong second, or without a picture."""
    from PIL import Image

    Image.new("RGB", (8, 8)).save(folder / "1.png")
    (sample,), summary = run(write(folder / "r.jsonl", record))
    assert (sample["kind"], len(sample["media"])) == ("chat", media)
    assert said(sample)[-2:] == [f"{''.join(marks_of(sample))}?", "x"]
    assert summary.notes["unused field messages[].timestamp"] == 2


def test_a_picture_beside_the_video_of_a_shards_chat_is_shown(folder: Path) -> None:
    """The chat became a stream of the video alone."""
    from PIL import Image

    Image.new("RGB", (8, 8)).save(folder / "1.png")
    members = {f"1.{name[2:]}": (folder / name).read_bytes() for name in ("1.png", "a.mp4")}
    record = json.dumps(chat(1, 2, mark="<image><video>")).encode()
    write_tar(folder / "s.tar", members | {"1.json": record})
    (sample,), _ = run(folder / "s.tar")
    assert said(sample) == ["<|image|><|video|>?", "x"]


def marks_of(sample: dict[str, Any]) -> list[str]:
    return [f"<|{medium['type']}|>" for medium in sample["media"]]


def test_a_streams_system_prompt_may_stand_beside_its_messages(folder: Path) -> None:
    record = chat(1, 2, video="a.mp4", system="Be brief.")
    (sample,), _ = run(write(folder / "r.jsonl", record))
    assert (sample["kind"], sample["messages"][0]["role"]) == ("realtime", "system")
    assert said(sample)[0] == "Be brief."


SPAN = {"start": 0, "end": 4, "description": "a person"}


@pytest.mark.parametrize(
    "more",
    [
        {"annotations": [SPAN]},  # characters of the text
        {"events": [{"timestamp": "2024-01-01", "description": "seen"}]},
        {"question": "Who?", "answer": "John."},
        {"input": "Write.", "output": "John lives."},
        {"start": 0, "end": 10, "video_id": "abc"},
        {"A": "x", "B": "y", "a0": "x", "a1": "z", "choice": "q", "time": 3, "timestamp": 4},
    ],
)
def test_a_text_is_learned_as_it_is_whatever_is_told_of_it(
    more: dict[str, Any], tmp_path: Path
) -> None:
    """It became a stream without a video, or a question about a text that is not shown."""
    (tmp_path / "in").mkdir()
    (sample,), summary = run(write(tmp_path / "in/r.jsonl", {"text": "John lives."} | more))
    assert said(sample) == ["", "John lives."]
    assert summary.notes == {f"unused field {name}": 1 for name in more}


def test_a_captions_other_fields_do_not_make_it_a_pair_or_a_stream(folder: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "p", "completion": "c"}, {"events": [SPAN]}, {"segments": [SPAN]},
    ]  # fmt: skip
    rows = [{"video": "a.mp4", "caption": "A bar."} | row for row in rows]
    assert [said(s) for s in run(write(folder / "r.jsonl", *rows))[0]] == [[FRAME, "A bar."]] * 3
    clip = (folder / "a.mp4").read_bytes()
    record = json.dumps({"caption": "A bar.", "input": "p", "output": "c"}).encode()
    (folder.parent / "shards").mkdir()
    write_tar(folder.parent / "shards/s.tar", {"1.mp4": clip, "1.json": record})
    (sample,), _ = run(folder.parent / "shards/s.tar")
    assert said(sample) == [FRAME, "A bar."]


def test_moments_beside_an_instruction_or_words_are_not_the_record() -> None:
    words = [{"start": 0, "end": 1, "text": "hi", "description": "a voice"}]
    assert looks_like_moments({"video": "a.mp4", "segments": [SPAN]})
    assert not looks_like_moments({"video": "a.mp4", "segments": words})
    assert not looks_like_moments({"video": "a.mp4", "events": [SPAN], "instruction": "Say."})
    assert not looks_like_moments({"events": [SPAN]})  # of no video


@pytest.mark.parametrize(
    "span",
    [
        {"start_time": "2020-01-01 10:00:00", "end_time": "2020-01-01 10:00:05"},
        {"start_time": 1690000000, "end_time": 1690000005},
        {"timestamp": ["2020-01-01T00:00:00Z", "2020-01-02T00:00:00Z"]},
        {"start": 0, "end": 0},
        {"start": 0, "end": -1},
        {"start": "0.0", "end": "-1"},  # as CSV has them
        {"start": "nan", "end": "None"},
    ],
)
def test_dates_and_what_says_the_whole_video_cut_nothing(span: Any, folder: Path) -> None:
    """The captions were rejected."""
    record = {"video": "a.mp4", "caption": "x"} | span
    (sample,), summary = run(write(folder / "r.jsonl", record))
    (data,) = sample["members"].values()
    assert round(probe_video(data).duration) == 10
    assert summary.notes == {f"unused field {name}": 1 for name in span}


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        ({"input": "a/1.jpg", "output": "A dog."}, "bad_schema"),
        ({"prompt": "A dog.", "completion": "b/2.png"}, "bad_schema"),
        ({"problem": "What is it?", "solution": "A dog.", "file_name": "1.jpg"}, "missing_file"),
    ],
)
def test_pairs_of_a_files_name_are_not_learned_as_text(
    pair: dict[str, str], reason: str, tmp_path: Path
) -> None:
    """The name of the picture was the question, or the question had no picture."""
    (tmp_path / "in").mkdir()
    samples, summary = run(write(tmp_path / "in/r.jsonl", pair, {"input": "1?", "output": "2"}))
    assert summary.rejected[reason] == 1
    assert [said(sample) for sample in samples] == [["1?", "2"]]


def test_what_yt_dlp_tells_of_a_video_is_not_its_caption(folder: Path) -> None:
    clip = (folder / "a.mp4").read_bytes()
    told = json.dumps({"title": "t", "description": "Subscribe!"}).encode()
    members = {f"{key}.{name}": data for key in ("1", "2")
               for name, data in (("mp4", clip), ("info.json", told))}  # fmt: skip
    write_tar(folder / "s.tar", members)
    samples, summary = run(folder / "s.tar")
    assert samples == []
    assert summary.rejected == {"missing_caption": 2, "missing_file": 2}


def test_a_key_that_stands_twice_with_nan_is_one_value() -> None:
    """NaN is not equal to itself."""
    assert str(loads('{"a": NaN, "a": NaN}')) == "{'a': nan}"
    with pytest.raises(ValueError, match="'a' stands twice"):
        loads('{"a": 1, "a": 2}')
