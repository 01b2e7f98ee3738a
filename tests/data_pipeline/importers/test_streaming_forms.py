"""Real-time records of other projects become the samples that one would write by hand."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.build import build_shards
from data_pipeline.importers.timeline import TimedText, Timeline, unroll
from data_pipeline.shards import ShardError
from data_pipeline.video import VideoInfo, frames_at, probe_video
from tests.data_pipeline.clips import number
from tests.data_pipeline.importers.realtime import FRAME, SILENCE, WATCHED, run, said, write
from tests.samples import imported


def event(content: str, **times: Any) -> dict[str, Any]:
    return {"content": content, **times}


def streamo(**fields: Any) -> dict[str, Any]:
    """Streamo's published example, with a shorter clip."""
    return {
        "video_name": "a.mp4", "video_path": "a.mp4", "task_type": "QA", "source": "LLaVA_Video",
        "question": [event("What is held?", time="3")],
        "response": [event("A microphone.", st_time=5.0, end_time=6.0, time="")],
    } | fields  # fmt: skip


# What Streamo's converter makes of it: asked at <2s-3s> and at the first frame, answered at
# <6s-7s>, after it has stood by.
BY_FRAMES = {
    "messages": [
        {"role": "system", "content": "Use </Silence> when ..."},
        *(
            turn
            for second in range(10)
            for turn in (
                {
                    "role": "user",
                    "content": ("What is held?\n" if second in (0, 2) else "")
                    + f"<{second}s-{second + 1}s>\n<stream>",
                },
                {
                    "role": "assistant",
                    "content": {4: "</Standby>", 5: "</Standby>", 6: "</Response> A microphone."}
                    .get(second, "</Silence>"),
                },
            )
        ),
    ],
    "videos": ["a.mp4"],
}  # fmt: skip
ANSWERED = FRAME + WATCHED * 4 + "A microphone." + WATCHED * 3 + SILENCE


def test_streamo_raw_and_its_converters_form_are_the_same_sample(folder: Path) -> None:
    (raw,), summary = run(write(folder / "raw.jsonl", streamo()))
    (stream,), noted = run(write(folder / "stream.jsonl", BY_FRAMES))
    assert said(raw) == ["", WATCHED * 2 + SILENCE, "What is held?", ANSWERED]
    assert raw["media"] == [
        {"type": "video", "file": "0.mp4", "times": [float(second) for second in range(10)]}
    ]
    assert (raw["messages"], raw["media"]) == (stream["messages"], stream["media"])
    assert raw["kind"] == "realtime"
    assert summary.notes == {}
    assert noted.notes == {
        "question repeated at the first frame, asked once": 1,
        "system prompt of another protocol, left out": 1,
    }


def test_joyai_counts_its_seconds_from_zero(folder: Path) -> None:
    record = streamo(
        question=[event("Tell me when.", time="4")], response=[event("Now.", time="7")]
    )
    (sample,), _ = run(write(folder / "joyai.jsonl", record))
    assert said(sample) == [
        "", WATCHED * 4 + SILENCE, "Tell me when.",
        FRAME + WATCHED * 3 + "Now." + WATCHED * 2 + SILENCE,
    ]  # fmt: skip


def test_joyais_converted_records_have_a_picture_a_second(folder: Path) -> None:
    from PIL import Image

    for i in range(3):
        Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(folder / f"{i}.png")
    turns = [
        {"role": "user", "content": "<0.0 seconds>\n<image>"},
        {"role": "assistant", "content": "</silence>"},
        {"role": "user", "content": "Red?\n<1.0 seconds>\n<image>"},
        {"role": "assistant", "content": "</silence>"},
        {"role": "user", "content": "<2.0 seconds>\n<image>"},
        {"role": "assistant", "content": "</response> Yes."},
    ]
    record = {"messages": turns, "images": ["0.png", "1.png", "2.png"], "video_path": "gone.mp4"}
    (sample,), _ = run(write(folder / "converted.jsonl", record))
    assert said(sample) == [
        "", f"{SILENCE}<|image|>{SILENCE}", "Red?", f"<|image|>{SILENCE}<|image|>Yes.{SILENCE}",
    ]  # fmt: skip
    assert [medium["type"] for medium in sample["media"]] == ["image"] * 3


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"question": [event("?", time=8)]}, "answer_before_question"),
        ({"response": [event("x", st_time=6, end_time=5)]}, "bad_time"),
        ({"response": [event("x", st_time=-2, end_time=5)]}, "bad_time"),
        ({"response": [event("x", st_time="soon", end_time=5)]}, "bad_time"),
        ({"response": [event("x", st_time=20, end_time=25)]}, "answer_after_end"),
        ({"question": [event("?", time=1), event("?", time=30)]}, "question_after_end"),
        ({"question": "?", "response": [event("x", st_time=1, end_time=2)]}, "bad_schema"),
        ({"video_path": "gone.mp4", "video_name": ""}, "missing_file"),
        ({"video_path": "broken.mp4"}, "undecodable_video"),
    ],
)
def test_what_cannot_be_used_is_rejected_by_reason(
    folder: Path, fields: dict[str, Any], reason: str
) -> None:
    (folder / "broken.mp4").write_bytes(b"no video")
    source = write(folder / "raw.jsonl", streamo(), streamo(**fields))
    samples, summary = run(source, form="streamo")
    assert len(samples) == 1
    assert summary.rejected == {reason: 1}


def test_what_is_changed_is_noted(folder: Path) -> None:
    records = [
        streamo(response=[event("b", st_time=6, end_time=8), event("a", st_time=3, end_time=6.5)]),
        streamo(question=[]),
        streamo(response=[]),
        streamo(id=7, response=[event("", st_time=4, end_time=5)]),
        streamo(id=7),
    ]
    samples, summary = run(write(folder / "raw.jsonl", *records))
    assert len(samples) == 5
    assert summary.notes == {
        "responses not in the order of time, sorted": 1,
        "responses whose times overlap": 1,
        "no question: an instruction put before the first frame": 1,
        "no answer: silence throughout": 2,
        "response without a text, left out": 1,
        "unused field id": 2,
        "id of an earlier record": 1,
    }
    assert said(samples[2])[-1] == FRAME + WATCHED * 7 + SILENCE


def moss_vl(segments: list[list[float]], content: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "system", "content": "Stay silent with <|silence|>."},
            {"role": "user", "content": "What?"},
            {"role": "assistant", "content": content},
        ],
        "images": [],
        "videos": [{"video_path": "a.mp4", "segments": segments}],
        "video_duration_seconds": 10.0,
        "metadata": {"level": "L3"},
    }


def test_moss_vl_streams_have_a_segment_for_each_mark(folder: Path) -> None:
    content = f"{WATCHED}{SILENCE}{FRAME}Bars.{FRAME}{SILENCE}"
    frames = moss_vl([[0], [1], [2]], content)
    spans = moss_vl([[0, 2], [2, 3], [3, 6]], content)
    back = moss_vl([[0], [2], [1]], content)
    late = moss_vl([[0], [1], [30]], content)
    few = moss_vl([[0], [1]], content)
    source = write(folder / "m.jsonl", frames, spans, back, late, few)
    samples, summary = run(source)
    assert [sample["media"][0]["times"] for sample in samples] == [
        [0.0, 1.0, 2.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    ]  # fmt: skip
    assert said(samples[0])[1:] == ["What?", content]
    assert said(samples[1])[2] == f"{SILENCE}{FRAME * 2}{SILENCE}{FRAME}Bars.{FRAME * 3}{SILENCE}"
    assert summary.rejected == {"bad_time": 1, "frame_after_end": 1, "mark_media_mismatch": 1}
    assert summary.notes == {}


def test_moss_vl_segments_of_a_chat_are_cut_out_of_their_video(folder: Path) -> None:
    chat = moss_vl([[2, 5]], "A bar.")
    chat["messages"][1]["content"] = "<|video|>What?"
    asked = {"prompt": "And now?", "response": "Bars.", "images": [],
             "videos": [{"video_path": "a.mp4", "segments": [[0, 2], [7, 9]]}]}  # fmt: skip
    samples, summary = run(write(folder / "m.jsonl", chat, asked))
    info = probe_video(samples[0]["members"]["0.mp4"])
    assert (info.duration, info.frames) == (pytest.approx(3.0, abs=0.01), 15)
    shown = [number(frame.permute(1, 2, 0)) for frame in
             frames_at(samples[0]["members"]["0.mp4"], [0.0, 1.0, 2.9])]  # fmt: skip
    assert shown == [10, 15, 24]
    assert said(samples[1]) == ["<|video|><|video|>\nAnd now?", "Bars."]
    assert len(samples[1]["members"]) == 2
    assert summary.notes == {"clip cut out of a longer video, encoded anew": 3}


def test_realtime_qa_in_parquet_has_its_frames_by_time(folder: Path) -> None:
    (folder / "dQw4w9.mp4").write_bytes((folder / "a.mp4").read_bytes())
    content = f"{WATCHED}{SILENCE}{FRAME}One.{SILENCE}"
    turns = [
        {"role": "user", "content": "Count."},
        {"role": "assistant", "content": content},
    ]
    rows = [
        {"messages": turns, "video": {"youtube_id": "dQw4w9", "frame_timestamps": [0.0, 1.5]}},
        {"messages": turns, "video": {"youtube_id": "gone", "frame_timestamps": [0.0, 1.5]}},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "qa.parquet")
    (sample,), summary = run(folder / "qa.parquet")
    assert sample["media"][0]["times"] == [0.0, 1.5]
    assert said(sample)[1] == content
    assert summary.rejected == {"missing_file": 1}


def test_videollm_onlines_dialogues(folder: Path) -> None:
    turns = [
        {"role": "user", "content": "Where am I?", "time": 2.6},
        {"role": "assistant", "content": "At home.", "time": 4.2},
        {"role": "assistant", "content": "Outside.", "time": 8.0},
    ]
    (sample,), _ = run(write(folder / "l.jsonl", {"video_uid": "a", "conversation": turns}))
    assert said(sample) == [
        "", WATCHED * 3 + SILENCE, "Where am I?",
        WATCHED * 2 + SILENCE + FRAME + "At home." + WATCHED * 2 + SILENCE + FRAME + "Outside."
        + WATCHED + SILENCE,
    ]  # fmt: skip


def test_media_are_found_in_tars_and_by_the_ends_of_foreign_paths(folder: Path) -> None:
    data = (folder / "a.mp4").read_bytes()
    with tarfile.open(folder / "clips.tar", "w") as tar:
        member = tarfile.TarInfo("./train/b.mp4")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    paths = ["/home/me/sets/train/b.mp4", "D:\\sets\\train\\b.mp4", "E:\\a.mp4", "train\\b.mp4"]
    records = [streamo(video_path=path, video_name="") for path in paths]
    samples, summary = run(write(folder / "raw.jsonl", *records))
    assert [sample["members"]["0.mp4"] for sample in samples] == [data] * 4
    assert summary.notes == {"medium in a tar": 3, "medium found by the end of its path": 1}


def test_a_list_is_read_record_by_record_up_to_where_it_is_cut_off(folder: Path) -> None:
    text = json.dumps([streamo(), streamo(), streamo()], indent=2)
    (folder / "raw.json").write_text(text[: text.rindex("{") - 40])
    samples, summary = run(folder / "raw.json")
    assert (len(samples), summary.rejected) == (2, {"bad_json": 1})


def test_an_unknown_form_is_told_its_fields_and_the_nearest(folder: Path) -> None:
    source = write(folder / "u.jsonl", {"question": "?", "response": "!", "clip": "a.mp4"})
    with pytest.raises(ShardError, match=r"question, response, clip: .* streamo \(missing: video_"):
        run(source)


def test_contents_of_parts_bring_their_media(folder: Path) -> None:
    from PIL import Image

    png = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(png, "PNG")
    user = [{"type": "image", "text": None}, {"type": "text", "text": "Colour?"}]
    rows = [{"messages": [{"role": "user", "content": user},
                          {"role": "assistant", "content": [{"type": "text", "text": "Red"}]}],
             "images": [{"bytes": png.getvalue(), "path": None}]}]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "hf.parquet")
    (sample,), _ = run(folder / "hf.parquet")
    assert said(sample) == ["<|image|>Colour?", "Red"]
    assert list(sample["members"].values()) == [png.getvalue()]


def test_long_answers_go_on_and_newer_questions_cut_them_off() -> None:
    info = VideoInfo(9.9, 10.0, 100)
    asked = (TimedText(0, "Q"), TimedText(5.5, "R"))
    answers = (
        TimedText(2.2, "one two three four five six"),
        TimedText(4, "more of it now"),
        TimedText(7, "yes"),
    )
    unrolled = unroll(Timeline(asked, answers, pace=4), info)
    assert [turn["content"] for turn in unrolled.messages] == [
        "Q",
        WATCHED * 3 + SILENCE + FRAME + "one two three four" + FRAME + " five six" + SILENCE
        + FRAME + "more of it now" + SILENCE,
        "R",
        WATCHED + SILENCE + FRAME + "yes" + WATCHED * 2 + SILENCE,
    ]  # fmt: skip
    assert unrolled.notes == []
    cut = unroll(Timeline(asked, (TimedText(5, "one two three four five"),), pace=2), info)
    assert cut.messages[1]["content"].endswith("one two")
    assert cut.notes == ["answer cut off by a newer question"]
    dense = unroll(Timeline((TimedText(0, "Q"),), (TimedText(8, "一二三四"),), pace=2), info)
    assert dense.messages[1]["content"].endswith(f"{FRAME}一二{FRAME}三四{SILENCE}")


def shard(path: Path, *samples: dict[str, Any]) -> Path:
    """A tar of others: of each sample the members by the rest of their names."""
    with tarfile.open(path, "w") as tar:
        for number, members in enumerate(samples):
            for rest, content in members.items():
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                entry = tarfile.TarInfo(f"clips/{number:04d}.{rest}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return path


def test_streams_in_tars_are_those_of_files(folder: Path) -> None:
    """The clip is a member beside the record, under its key or the name that the record gives."""
    clip = (folder / "a.mp4").read_bytes()
    words = [{"start": 1.0, "end": 1.4, "text": "One"}, {"start": 2.1, "end": 2.5, "text": "two."}]
    instant = streamo(response=[event("Now.", time=7)])  # by itself it is JoyAI's
    records = [
        streamo(), instant, BY_FRAMES, {"words": words}, streamo(video_path="/their/disk/x.mp4"),
    ]  # fmt: skip
    named = [
        record | ({} if "messages" in record else {"video_path": "a.mp4"}) for record in records
    ]
    expected, _ = run(write(folder / "all.jsonl", *named))
    samples, summary = run(shard(folder / "all.tar", *({"mp4": clip, "json": r} for r in records)))
    assert summary.rejected == {}
    assert summary.notes["the sample's only video, whose name is not the one that the record gives"]
    assert [sample["messages"] for sample in samples] == [e["messages"] for e in expected]
    assert [sample["media"] for sample in samples] == [e["media"] for e in expected]

    (alone,), _ = run(shard(folder / "joyai.tar", {"mp4": clip, "json": instant}))
    (as_named,), _ = run(
        shard(folder / "named.tar", {"mp4": clip, "json": instant}), form="streamo"
    )
    assert alone["messages"] != samples[1]["messages"] == as_named["messages"]


def test_frames_in_tars_stand_in_the_order_of_their_numbers(folder: Path) -> None:
    from PIL import Image

    pictures: dict[str, Any] = {}
    for second in (10, 2, 0, 11, 1, *range(3, 10)):
        Image.new("RGB", (8, 8), (20 * second, 0, 0)).save(buffer := io.BytesIO(), "PNG")
        pictures[f"{second}.png"] = buffer.getvalue()
    turns = [
        turn
        for second in range(12)
        for turn in (
            {"role": "user", "content": f"<{second}.0 seconds>\n<image>"},
            {"role": "assistant", "content": "</silence>" if second else "</response> Red."},
        )
    ]
    source = shard(folder / "frames.tar", pictures | {"json": {"messages": turns}})
    out = folder.parent / "out-frames"
    build_shards(source, out)
    (sample,) = imported(out).values()
    members = [io.BytesIO(sample["members"][f"{second}.png"]) for second in range(12)]
    reds = [Image.open(member).getpixel((0, 0)) for member in members]
    assert reds == [(20 * second, 0, 0) for second in range(12)]


def test_a_stream_in_a_tar_without_its_clip_is_rejected(folder: Path) -> None:
    clip = (folder / "a.mp4").read_bytes()
    source = shard(
        folder / "some.tar",
        {"mp4": clip, "json": streamo()},
        {"json": streamo()},
        {"a.mp4": clip, "b.mp4": clip, "json": streamo(video_path="c.mp4", video_name="")},
    )
    samples, summary = run(source)
    assert len(samples) == 1
    assert summary.rejected == {"missing_file": 2}


@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_messages_with_seconds_are_said_at_these(field: str, folder: Path) -> None:
    """They became a chat about the whole video, whose times were left out."""
    keys = ("role", "content", "time") if field == "messages" else ("from", "value", "timestamp")

    def turn(*values: Any) -> dict[str, Any]:
        return dict(zip(keys, values, strict=False))

    turns = [turn("system", "Be brief."), turn("user", "<video>\nTell me.", 0.0),
             turn("assistant", "Now.", 1.5)]  # fmt: skip
    dated = [turn("user", "<video>q", "2024-05-01 10:00"), turn("assistant", "a", 1714557600)]
    source = write(
        folder / "r.jsonl", {"video": "a.mp4", field: turns}, {"video": "a.mp4", field: dated},
        {field: [turn("user", "q", 1), turn("assistant", "a", 2)]},
    )  # fmt: skip
    samples, summary = run(source)
    by_kind = {sample["kind"]: said(sample) for sample in samples if sample["media"]}
    assert by_kind["realtime"][:2] == ["Be brief.", "Tell me."]
    assert by_kind["realtime"][2].startswith(f"{WATCHED * 2}{SILENCE}{FRAME}Now.{SILENCE}{FRAME}")
    assert by_kind["chat"] == ["<|video|>q", "a"]  # dates are no seconds of a video
    assert summary.imported == {"realtime": 1, "video": 1, "text": 1}
