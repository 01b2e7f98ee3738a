"""What a record gives is used, counted by name, or the reason why the record is rejected."""

from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipeline.build import Summary, build_shards
from data_pipeline.encode import EncodeConfig, SampleEncoder
from data_pipeline.shards import read_samples
from data_pipeline.tokens import build_toy_tokenizer, load_tokenizer
from data_pipeline.video import frames_at, probe_video
from tests.data_pipeline.clips import animated, every, number, video
from tests.samples import imported


def jpeg(color: str = "red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    animated(tmp_path / "a.gif", [500] * 4)
    return tmp_path


def run(source: Path, *records: Any) -> tuple[Summary, list[Any], dict[str, str]]:
    """What became of the records: the summary, the samples, and reasons with their details."""
    if records:
        source.write_text("".join(json.dumps(record) + "\n" for record in records))
    out = source.parent / f"out_{source.name}"
    summary = build_shards(source, out)
    lines = map(json.loads, (out / "rejected.jsonl").read_text().splitlines())
    reasons = {line["key"][-6:]: f"{line['reason']}: {line['detail']}" for line in lines}
    return summary, [sample for _, sample in sorted(imported(out).items())], reasons


def said(sample: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in sample["messages"]]


def user(content: Any = "q", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def gpt(content: Any = "a", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


TALK = [{"from": "human", "value": "<image>\nColor?"}, {"from": "gpt", "value": "Red."}]


@pytest.mark.parametrize("form", ["a.jpg", ["a.jpg"], {"path": "a.jpg"}])
@pytest.mark.parametrize("field", ["image", "images", "image_path", "image_url"])
def test_a_picture_under_any_usual_name_is_shown(folder: Path, field: str, form: Any) -> None:
    alpaca = {"instruction": "<image>What?", "input": "", "output": "red", field: form}
    for name, record in (("c", {"conversations": TALK, field: form}), ("i", alpaca)):
        summary, (sample,), _ = run(folder / f"{name}.jsonl", record)
        assert summary.imported == {"image": 1}
        assert sample["messages"][0]["content"].startswith("<|image|>")
        assert sample["members"] == {"0.jpg": jpeg()}


def test_media_and_marks_that_do_not_meet(folder: Path) -> None:
    plain = [user("What?"), gpt()]
    summary, samples, reasons = run(
        folder / "a.jsonl",
        {"messages": plain, "image": "a.jpg"},
        {"messages": plain, "images": ["a.jpg"]},
        {"messages": [user("<image>what?"), gpt()]},
        {"messages": [user("<image>what?"), gpt()], "video": "a.gif"},  # LLaVA-Video's mark
        {"messages": plain, "images": ["a.jpg"], "image": "a.jpg"},
        {"messages": plain, "audio": "a.wav"},
        {"messages": plain, "picture": "a.jpg", "id": 7, "empty": None},
        {"messages": plain, "pictured": "a.jpg", "id": 8, "empty": None},
    )
    assert [sample["messages"][0]["content"] for sample in samples] == [
        "<|image|>\nWhat?", "<image>what?", "<|video|>what?", "What?",
    ]  # fmt: skip
    assert summary.imported == {"image": 1, "text": 2, "video": 1}
    assert summary.notes == {
        "medium without a mark, put before the first user's turn": 1,
        "<image> in a record without media": 1,
        "unused field pictured": 1,
        "unused field id": 1,
    }
    assert {key: reason.partition(":")[0] for key, reason in reasons.items()} == {
        "000001": "mark_media_mismatch", "000004": "ambiguous_media", "000005": "unknown_media",
        "000006": "missing_file",
    }  # fmt: skip


def test_a_row_of_text_that_names_a_picture_is_its_caption(folder: Path) -> None:
    rows = ({"text": "plain words"}, {"text": "a red thing", "image": "a.jpg"})
    summary, _, _ = run(folder / "a.jsonl", *rows)
    assert summary.imported == {"text": 1, "image": 1}


def test_calls_of_tools_and_their_answers(folder: Path) -> None:
    function = {"name": "weather", "arguments": '{"city": "Rome"}'}
    tools = [{"type": "function", "function": {"name": "weather"}}]
    summary, samples, reasons = run(
        folder / "a.jsonl",
        {"tools": tools, "messages": [
            user(), gpt("", tool_calls=[{"type": "function", "function": function}]),
            {"role": "tool", "tool_call_id": "1", "content": "21 C"}, gpt("Warm."),
        ]},
        {"messages": [user(), gpt(None, function_call=function),
                      {"role": "function", "name": "weather", "content": "21 C"}, gpt("Warm.")]},
        {"messages": [user(), gpt("Look:", tool_calls=[function, function])]},
        {"messages": [user(), gpt("")]},
        {"messages": [user(), gpt(" \n")]},
        {"messages": [user(), gpt(tool_calls=["weather"])]},
        {"messages": [user(), gpt(reasoning_content="hm")]},
        {"messages": [user(), gpt()], "system": ["a", "b"]},
    )  # fmt: skip
    call = '{"name": "weather", "arguments": {"city": "Rome"}}'
    assert said(samples[0]) == [
        ("system", json.dumps(tools)), ("user", "q"), ("assistant", call), ("user", "21 C"),
        ("assistant", "Warm."),
    ]  # fmt: skip
    assert said(samples[1])[1:3] == [("assistant", call), ("user", "21 C")]
    assert said(samples[2])[1] == ("assistant", f"Look:\n{call}\n{call}")
    assert summary.notes == {"unused field messages[].reasoning_content": 1}
    assert {key: reason.partition(":")[0] for key, reason in reasons.items()} == {
        "000003": "missing_text", "000004": "missing_text", "000005": "bad_schema",
        "000007": "bad_schema",
    }  # fmt: skip
    assert "system: ['a', 'b']" in reasons["000007"]


FLAGS: list[dict[str, Any]] = [
    {"loss": False},
    {"weight": 0},
    {"train": False},
    {"train_on_turn": False},
    {"weight": 0.0},
]


def test_turns_that_are_not_to_be_learned_are_context(folder: Path) -> None:
    talks = [{"messages": [user(), gpt("BAD", **flag), user(), gpt("good")]} for flag in FLAGS]
    talks += [{"messages": [user(), gpt("fine", loss=True, weight=1)]}]
    build_toy_tokenizer(folder / "tok", ["BAD good fine q"], 512)
    run(folder / "a.jsonl", *talks)
    config = EncodeConfig(str(folder / "tok"), 999, 56, 1, 1.0, 1, 8, "chat")
    tokenizer = load_tokenizer(folder / "tok")
    encoder = SampleEncoder(config, tokenizer)
    learned, read = [], []
    for key, parts in read_samples(folder / "out_a.jsonl/text"):
        made = encoder.encode(key, parts)
        learned.append(tokenizer.decode(made.labels[made.labels >= 0].tolist()))
        read.append("BAD" in tokenizer.decode(made.tokens.tolist()))
    assert learned == ["good"] * len(FLAGS) + ["fine"]
    assert read == [True] * len(FLAGS) + [False]

    _, _, reasons = run(
        folder / "b.jsonl",
        {"messages": [user(), gpt(loss=False)]},
        {"messages": [user(), gpt(weight=0.5)]},
        {"conversations": TALK[1:], "label": False},
        {"conversations": TALK[1:], "kto_tag": False},
        {"messages": [user(), gpt()], "chosen": gpt(), "rejected": gpt("b")},
        {"conversations": TALK[1:], "label": "False"},
        {"conversations": TALK[1:], "kto_tag": 0},
        {"messages": [user(), gpt()], "negative_messages": [user(), gpt("b")]},
        {"messages": [user(), gpt()], "loss": False},
        {"messages": [user(), gpt()], "weight": 0.0},
        {"messages": [user(), gpt(training=False)]},
    )
    assert [reason.split(":")[0] for reason in reasons.values()] == [
        "no_labels", "bad_schema", *["preference_data"] * 6, *["no_labels"] * 3,
    ]  # fmt: skip
    assert "messages[1].weight: 0.5" in reasons["000001"]


STRANGE = {
    "url": {"image": "http://[bad/a.jpg", "caption": "x"},
    "url2": {"image": "https://[::zz]/a.jpg", "caption": "x"},
    "number": {"image": 7, "caption": "x"},
    "nothing": {"caption": "x"},
}


def test_one_strange_record_costs_itself(folder: Path) -> None:
    good = {"image": "a.jpg", "caption": "red"}
    summary, _, reasons = run(folder / "a.jsonl", good, *STRANGE.values(), good)
    assert summary.imported == {"image": 2}
    assert len(reasons) == len(STRANGE)
    assert "image: 'http://[bad/a.jpg': Invalid IPv6 URL" in reasons["000001"]

    def event(end: Any) -> dict[str, Any]:
        info = {"video_path": "v.mp4", "time_info": [{"start": 0, "end": end}]}
        turns = [user("<video>go"), gpt("ok")]
        return {
            "messages": turns,
            "videos": [f"[Streaming Event Caption][INFO]{json.dumps(info)}"],
        }

    ends = [float("nan"), float("inf"), -1, 1e12, None, "1:x"]
    talk = {"messages": [user(), gpt()]}
    summary, _, reasons = run(folder / "b.jsonl", talk, *map(event, ends), talk)
    assert summary.imported == {"text": 2}
    assert [reason.split(":")[0] for reason in reasons.values()] == ["bad_schema"] * len(ends)

    turns = {"instruction": "q", "output": "a"}
    histories = [1, True, "x", [1], [["a"]], {"a": 1}]
    strange = [turns | {"history": history} for history in histories]
    summary, _, reasons = run(folder / "c.jsonl", turns, *strange)
    assert summary.imported == {"text": 1}
    assert all("history" in reason for reason in reasons.values())


TEXTS = {
    "bom": b"\xef\xbb\xbfred square",
    "le": b"\xff\xfe" + "red square".encode("utf-16-le"),
    "be": b"\xfe\xff" + "red square".encode("utf-16-be"),
    "utf32": "red square".encode("utf-32"),
}
BROKEN = {
    "latin": "carr\u00e9".encode("cp1252"),
    "gbk": "\u7ea2\u8272".encode("gbk"),
    "bare": "red".encode("utf-16-le"),  # no mark: it is UTF-8 with NULs
    "lost": "a \ufffd".encode(),
}


@pytest.mark.parametrize("suffix", ["txt", "TXT"])
def test_texts_are_read_as_their_marks_say_or_refused(folder: Path, suffix: str) -> None:
    files = {f"{name}.{suffix}": text for name, text in (TEXTS | BROKEN).items()}
    files |= {f"{name}.jpg": jpeg() for name in TEXTS | BROKEN}
    (folder / "caps").mkdir()
    for name, data in files.items():
        (folder / "caps" / name).write_bytes(data)
    tar(folder / "caps.tar", sorted(files.items()))
    for source in (folder / "caps", folder / "caps.tar"):
        _, samples, reasons = run(source)
        assert [sample["messages"][1]["content"] for sample in samples] == ["red square"] * 4
        assert [reason.split(":")[0] for reason in reasons.values()] == ["bad_text"] * 4


@pytest.mark.parametrize("form", ["utf-8-sig", "utf-16", "utf-8"])
def test_files_of_records_in_any_unicode(folder: Path, form: str) -> None:
    talk = {"messages": [user("\u7ea2"), gpt("\ufeffgr\u00fcn")]}
    (folder / "a.jsonl").write_bytes(f"{json.dumps(talk, ensure_ascii=False)}\n".encode(form))
    (folder / "b.json").write_bytes(json.dumps([talk], ensure_ascii=False).encode(form))
    (folder / "c.csv").write_bytes("image,caption\na.jpg,gr\u00fcn\n".encode(form))
    for name in ("a.jsonl", "b.json", "c.csv"):
        _, (sample,), _ = run(folder / name)
        assert sample["messages"][1]["content"] == "gr\u00fcn"


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as out:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            out.addfile(entry, io.BytesIO(data))
    return path


R, B = jpeg("red"), jpeg("blue")


@pytest.mark.parametrize("suffix", ["tar", "tgz"])
def test_members_of_a_key_belong_together_wherever_they_stand(folder: Path, suffix: str) -> None:
    path = tar(folder / f"a.{suffix}", [
        ("b/c.json", json.dumps({"conversations": TALK, "image": "c.jpg"}).encode()),
        ("a.jpg", R), ("b.jpg", B), ("._a.jpg", b"mac"), ("a.txt", b"red"), ("b.txt", b"blue"),
        ("__MACOSX/b.txt", b"mac"), ("b/c.jpg", B), ("22.05.jpg", R), ("22.06.jpg", B),
        ("22.05.txt", b"red"), ("22.06.txt", b"blue"), ("d.jpg", R), ("d.txt", b"red"),
        ("d.cls", b"7"),
    ])  # fmt: skip
    summary, samples, _ = run(path)
    assert summary.imported == {"image": 6}
    shown = [(s["messages"][1]["content"], s["members"]["0.jpg"]) for s in samples]
    assert shown == [
        ("Red.", B), ("red", R), ("blue", B), ("red", R), ("blue", B), ("red", R),
    ]  # fmt: skip
    assert summary.notes == {"file of macOS in a shard": 2, "unused member .cls": 1}


def test_members_that_cannot_be_used_are_named(folder: Path) -> None:
    path = tar(folder / "a.tar", [
        ("a.jpg", R), ("a.txt", b"red"), ("alone.txt", b"no picture"), ("h.heic", b"x"),
        ("h.txt", b"x"), ("f.flac", b"x"), ("f.txt", b"x"), ("j.jfif", R), ("j.txt", b"red"),
        ("two.jpg", R), ("two.txt", b"red"), ("two.jpg", B), ("g.txt", b"turns"),
        ("g.gif", (folder / "a.gif").read_bytes()),
    ])  # fmt: skip
    summary, samples, reasons = run(path)
    assert [sample["messages"][1]["content"] for sample in samples] == ["red", "red", "turns"]
    assert summary.notes == {"animated picture, of which the first one is shown": 1}
    assert {key: reason.split(":")[0] for key, reason in reasons.items()} == {
        "000001": "missing_file", "000002": "unknown_media", "000003": "unknown_media",
        "000005": "repeated_member",
    }  # fmt: skip
    assert "h.heic" in reasons["000002"]
    assert "two.jpg" in reasons["000005"]


def test_links_are_followed_and_texts_in_another_shard_are_no_samples(folder: Path) -> None:
    (folder / "in").mkdir()
    with tarfile.open(folder / "in/b.tar", "w") as out:
        for name, data in (("a.jpg", R), ("a.txt", b"red"), ("b.txt", b"the red")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            out.addfile(entry, io.BytesIO(data))
        for name, target, kind in (
            ("b.jpg", "a.jpg", tarfile.LNKTYPE), ("c.jpg", "a.jpg", tarfile.SYMTYPE),
            ("c.txt", "b.txt", tarfile.LNKTYPE), ("d.jpg", "gone.jpg", tarfile.SYMTYPE),
        ):  # fmt: skip
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, target
            out.addfile(entry)
    tar(folder / "in/a.tar", [("x.txt", b"apart")])  # before the shard that has pictures
    summary, samples, reasons = run(folder / "in")
    assert summary.imported == {"image": 3}
    assert [s["messages"][1]["content"] for s in samples] == ["red", "the red", "the red"]
    assert [reason.split(":")[0] for reason in reasons.values()] == ["missing_file"] * 2


@pytest.mark.parametrize("spelling", ["caps", "./caps", "caps/", "../{name}/caps", "{whole}/caps"])
def test_a_folder_by_any_path(folder: Path, spelling: str, monkeypatch) -> None:
    (folder / "caps/inner").mkdir(parents=True)
    (folder / "caps/a.jpg").write_bytes(R)
    (folder / "caps/a.txt").write_text("red")
    (folder / "caps/inner/b.JPG").write_bytes(B)
    (folder / "caps/inner/b.txt").write_text("blue")
    monkeypatch.chdir(folder)
    source = spelling.format(name=folder.name, whole=folder)
    assert build_shards(source, folder / "out").imported == {"image": 2}
    captions = [sample["messages"][1]["content"] for sample in imported(folder / "out").values()]
    assert captions == ["red", "blue"]


def test_a_column_of_videos_holds_videos(folder: Path) -> None:
    animated(folder / "moving.png", [500] * 4)
    animated(folder / "a.webp", [500] * 4)
    (folder / "t.csv").write_text(
        "video_path,caption\na.gif,turns\nmoving.png,moves\na.webp,winks\n"
    )
    summary, _, _ = run(folder / "t.csv")
    assert summary.imported == {"video": 3}
    (folder / "u.csv").write_text("image,caption,views\na.gif,turns,7\n")
    summary, _, _ = run(folder / "u.csv")
    assert summary.imported == {"image": 1}
    assert summary.notes == {
        "animated picture, of which the first one is shown": 1,
        "unused field views": 1,
    }


def test_a_picture_of_several_is_named(folder: Path) -> None:
    pages = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for name in ("scan.tif", "move.avif"):
        pages[0].save(folder / name, save_all=True, append_images=pages[1:])
    pages[0].save(folder / "one.tif")
    pictures = [{"image": name, "caption": "x"} for name in ("scan.tif", "move.avif", "one.tif")]
    summary, _, _ = run(folder / "a.jsonl", *pictures)
    assert summary.notes == {"animated picture, of which the first one is shown": 2}


def test_rows_whose_media_are_in_different_columns(folder: Path) -> None:
    (folder / "t.csv").write_text(
        "video,image,caption\na.gif,,turns\n,a.jpg,red\n,,nothing\na.gif,,nan\n"
    )
    summary, _, _ = run(folder / "t.csv")
    assert summary.imported == {"video": 1, "image": 1}
    assert summary.rejected == {"missing_file": 1, "missing_caption": 1}
    summary, _, _ = run(folder / "t.jsonl", {"video": math.nan, "image": "a.jpg", "caption": "red"})
    assert summary.imported == {"image": 1}


def test_a_part_of_a_video_is_cut_out_of_it(folder: Path) -> None:
    video(folder / "a.mp4", every(0.1, 100))
    part = {"type": "video", "video": "a.mp4", "video_start": 4.0, "video_end": "6s"}
    content = [part, {"type": "text", "text": "?"}]
    summary, (sample,), reasons = run(
        folder / "a.jsonl",
        {"messages": [user(content), gpt()]},
        {"messages": [user([part | {"video_end": 3}]), gpt()]},
        {"messages": [user([part | {"video_start": 30.0, "video_end": None}]), gpt()]},
    )
    assert summary.rejected == {"bad_time": 1, "frame_after_end": 1}, reasons
    clip = sample["members"]["0.mp4"]
    assert probe_video(clip).duration == pytest.approx(2.0, abs=0.05)
    assert [number(f.permute(1, 2, 0)) for f in frames_at(clip, [0.0, 1.0, 1.9])] == [40, 50, 59]
