"""Captions of a part of a video get that part; ids name videos; lists that tables have as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.video import frames_at, probe_video
from tests.data_pipeline.clips import number
from tests.data_pipeline.importers.realtime import FRAME, SILENCE, WATCHED, run, said, write


def shown(sample: dict[str, Any]) -> tuple[float, int, int]:
    """Seconds of a sample's clip, and the numbers of its first and last frame."""
    (data,) = sample["members"].values()
    seconds = probe_video(data).duration
    first, last = frames_at(data, [0.0, seconds - 0.05])
    numbers = (number(frame.permute(1, 2, 0)) for frame in (first, last))
    return round(seconds, 1), *numbers  # type: ignore[return-value]


WHOLE = (10.0, 0, 49)  # the clip of the folder: frame n begins at n / 5 s


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"start": 2, "end": 4}, (2.0, 10, 19)),
        ({"start_time": "00:00:02.000", "end_time": "0:04"}, (2.0, 10, 19)),  # OpenVid, Koala-36M
        ({"segment": [2, 4.0]}, (2.0, 10, 19)),
        ({"start_timestamp": "00:00:02.00", "stop_timestamp": "00:00:04.00"}, (2.0, 10, 19)),
        ({"start": 0, "end": 10}, WHOLE),
        ({"start": 60, "end": 70}, WHOLE),  # of the video that the file was cut from
        ({"start": None, "end": None}, WHOLE),
        ({"start": 2}, WHOLE),
        ({"start": 60, "end": 65}, "frame_after_end"),
        ({"start": 4, "end": 2}, "bad_time"),
    ],
)
def test_a_caption_of_some_seconds_gets_these(
    given: dict[str, Any], part: Any, folder: Path
) -> None:
    """The whole video was learned with it."""
    samples, summary = run(write(folder / "r.jsonl", {"video": "a.mp4", "caption": "x", **given}))
    if isinstance(part, str):
        assert summary.rejected == {part: 1}
        return
    assert [shown(sample) for sample in samples] == [part]
    already = "video that is no longer than its start and end say: taken as cut already"
    assert (already in summary.notes) == (given.get("start") == 60)


@pytest.mark.parametrize("end", [9.95, 10, 10.5])
def test_a_part_that_is_the_whole_video_is_stored_byte_for_byte(end: float, folder: Path) -> None:
    """It was encoded anew. The last frame begins at 9.8 s; an end may be rounded up."""
    record = {"video": "a.mp4", "caption": "x", "start": 0, "end": end}
    (sample,), summary = run(write(folder / "r.jsonl", record))
    assert list(sample["members"].values()) == [(folder / "a.mp4").read_bytes()]
    assert summary.notes == {}


def test_each_caption_of_a_list_has_its_own_seconds(folder: Path) -> None:
    """Panda-70M's lists are as Python prints them; its `url` is a page's."""
    (folder / "panda.csv").write_text(
        "videoID,url,timestamp,caption\n"
        "a,https://www.youtube.com/watch?v=a,\"[['0:00:00.000', '0:00:02.000'], "
        "['0:00:02.000', '0:00:05.000']]\",\"['A bar.', \"\"A man's bar.\"\"]\"\n"
    )
    samples, _ = run(folder / "panda.csv")
    assert [(said(sample)[1], shown(sample)) for sample in samples] == [
        ("A bar.", (2.0, 0, 9)), ("A man's bar.", (3.0, 10, 24)),
    ]  # fmt: skip


def test_an_id_names_the_video_of_a_caption(folder: Path) -> None:
    rows = [
        {"YoutubeID": "a", "Start_timestamp": "00:00:01.000", "End_timestamp": "00:00:02.000",
         "Caption": "InternVid's."},
        {"YoutubeID": "b", "Caption": "Not there."},
    ]  # fmt: skip
    (sample,), summary = run(write(folder / "r.jsonl", *rows))
    assert (said(sample)[1], shown(sample)) == ("InternVid's.", (1.0, 5, 9))
    assert summary.rejected == {"missing_file": 1}
    (sample,), _ = run(write(folder / "s.jsonl", {"video_id": "a", "sentence": "MSVD's."}))
    assert said(sample) == [FRAME, "MSVD's."]
    (sample,), _ = run(write(folder / "t.jsonl", {"video_id": "a", "text": "A transcript."}))
    assert said(sample) == ["", "A transcript."]  # plain text with its origin


def test_a_list_of_captions_that_a_table_has_as_text_is_one(folder: Path) -> None:
    """The brackets were learned."""
    (folder / "f.csv").write_text(
        'raw,filename\n"[""One."", ""Two.""]",a.mp4\n[Music] plays,a.mp4\n"[1, 2]",a.mp4\n'
    )
    samples, _ = run(folder / "f.csv", caption_column="raw")
    assert [said(sample)[1] for sample in samples] == ["One.", "Two.", "[Music] plays", "[1, 2]"]


def test_sharegpt4videos_caption_of_all_keyframes_is_the_videos(folder: Path) -> None:
    captions = [{"idx": str(i), "content": f"Keyframe {i}."} for i in (1, 2)]
    record = {"video_id": "z", "video_path": "a.mp4", "timestamp": ["00:00:00.000", "00:00:02.000"],
              "captions": [*captions, {"idx": "-1", "content": "All of it."}]}  # fmt: skip
    (sample,), summary = run(write(folder / "r.jsonl", record, record | {"captions": captions}))
    assert (said(sample)[1], shown(sample)) == ("All of it.", WHOLE)
    assert summary.rejected == {"missing_caption": 1}


def test_howto100ms_lists_are_words_with_times(folder: Path) -> None:
    texts = ["here it is", "now mix", "late"]
    lists = {"start": [0, 2.0], "end": [2.0, 4.0], "text": texts}
    (folder / "r.json").write_text(json.dumps({"a": lists}))
    (sample,), summary = run(folder / "r.json")
    assert said(sample)[1].startswith(f"{WATCHED}{SILENCE}{FRAME}here{FRAME} it is{FRAME}")
    assert said(sample)[1].count(" mix") == 1
    assert summary.notes["word without a time, said with the one before"] == 1


@pytest.mark.parametrize(("stamps", "again"), [(("00:00", "00:01"), 0), (("00:01", "00:01"), 1)])
def test_frames_that_are_rounded_to_one_second_are_counted(
    stamps: tuple[str, str], again: int, folder: Path
) -> None:
    """Of two frames a second, written as MM:SS, the model sees each first one twice."""
    info = json.dumps({"video_path": "a.mp4", "time_info": stamps})
    record = {
        "messages": [{"role": "user", "content": "<video>?"},
                     {"role": "assistant", "content": "<video>x"}],
        "videos": [f"[RealTime QA][INFO]{info}", "[RealTime QA][PLACEHOLDER]"],
    }  # fmt: skip
    (sample,), summary = run(write(folder / "r.jsonl", record))
    assert len(sample["media"][0]["times"]) == 2
    assert summary.notes.get("frame of the same second as the one before", 0) == again


@pytest.mark.parametrize("name", ["segments", "events", "annotations"])
def test_captions_of_moments_in_objects_are_said_at_their_ends(name: str, folder: Path) -> None:
    """`segments` were taken for words without a text, and rejected."""
    moments = [{"start": 0, "end": "0:02", "caption": "One."}, {"timestamp": [2, 3], "caption": ""}]
    (sample,), summary = run(write(folder / "r.jsonl", {"video": "a.mp4", name: moments}))
    assert said(sample)[1] == f"{WATCHED * 2}{SILENCE}{FRAME}One.{SILENCE}"
    assert summary.notes["caption without a text, left out"] == 1


def test_frames_as_pictures_of_one_mark_are_told(folder: Path) -> None:
    """As Qwen-VL's and LLaVA-Next's records may have them: the mark was said to be missing."""
    turns = [{"from": "human", "value": "<video>q"}, {"from": "gpt", "value": "a"}]
    source = write(folder / "r.jsonl", {"conversations": turns, "video": ["1.jpg", "2.jpg"]})
    run(source)
    (line,) = (folder.parent / "out-0/rejected.jsonl").read_text().splitlines()
    assert "frames as pictures: make a video of them" in json.loads(line)["detail"]
