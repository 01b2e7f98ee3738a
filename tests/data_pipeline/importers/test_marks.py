"""The marks of other projects show where a picture belongs, and which."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipeline.build import Summary, build_shards
from data_pipeline.importers.conversation import conversation_draft
from tests.samples import imported, write_tar


def jpeg(color: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "r.jpg").write_bytes(jpeg("red"))
    (tmp_path / "b.jpg").write_bytes(jpeg("blue"))
    return tmp_path


def run(source: Path) -> tuple[Summary, list[tuple[str, str]]]:
    """The summary, and of each sample the user's turn and its pictures: `r`, `b`."""
    out = source.parent / "out"
    summary = build_shards(source, out)
    names = {jpeg("red"): "r", jpeg("blue"): "b"}
    return summary, [
        (
            sample["messages"][0]["content"].replace("<|image|>", "@"),
            "".join(names[sample["members"][medium["file"]]] for medium in sample["media"]),
        )
        for _, sample in sorted(imported(out).items())
    ]


def asked(text: Any, answer: str = "Red.", **media: Any) -> dict[str, Any]:
    """In the words of Qwen-VL and LLaVA; `own`: of the message."""
    user = {"from": "user", "value": text} | media.pop("own", {})
    return {"conversations": [user, {"from": "assistant", "value": answer}], **media}


def part(path: str) -> dict[str, str]:
    return {"type": "image", "image": path}


def source(**said: str) -> dict[str, Any]:
    """A part of Anthropic's messages."""
    return {"type": "image", "source": said}


BLUE = base64.b64encode(jpeg("blue")).decode()
# What a part that marks the place of one of the record's media may say besides.
OPTIONS: list[dict[str, Any]] = [
    {"cache_control": {"type": "ephemeral"}}, {"meta": {"size": None}}, {"source": "coco"},
    {"alt": "A red square. " * 30}, {"alt": "\u7ea2" * 300},
]  # fmt: skip
SHOWN = [
    (asked("Picture 1: <img>b.jpg</img>\nPicture 2: <img>r.jpg</img>\nWhich?"),
     ("Picture 1: @\nPicture 2: @\nWhich?", "br")),
    (asked("<img>r.jpg</img>?", images=["r.jpg"]), ("@?", "r")),
    (asked("<image_01> or <image_00>?", image={"<image_00>": "r.jpg", "<image_01>": "b.jpg"}),
     ("@ or @?", "br")),
    (asked("<image 2>, <image 1>? <image 1>!", images=["r.jpg", "b.jpg"]),
     ("@, @? <image 1>!", "br")),
    (asked("<|image_1|>?", image="b.jpg"), ("@?", "b")),
    (asked("<ImageHere>, then <ImageHere>", image=["r.jpg", "b.jpg"]), ("@, then @", "rb")),
    (asked("<|vision_start|><|image_pad|><|vision_end|>?", images=["b.jpg"]), ("@?", "b")),
    (asked("What?", own={"images": ["b.jpg", "r.jpg"]}), ("@@What?", "br")),
    (asked("What <image>?", own={"image": "b.jpg"}), ("What @?", "b")),
    (asked([part("r.jpg"), {"type": "text", "text": "?"}]), ("@?", "r")),
    (asked([{"image": "r.jpg"}, {"text": "?"}]), ("@?", "r")),
    ({"instruction": "<img>r.jpg</img>?", "input": "", "output": "Red."}, ("@?", "r")),
    (asked("<img>./b.jpg</img>, <img>r.jpg</img>? <img>r.jpg</img>!", images=["r.jpg", "b.jpg"]),
     ("@, @? <img>r.jpg</img>!", "br")),
    (asked("<image>? <img>icon.png</img>", images=["r.jpg"]), ("@? <img>icon.png</img>", "r")),
    (asked("<img>icon.png</img>?", image="r.jpg"), ("@\n<img>icon.png</img>?", "r")),
    (asked("See <image_3> of the book", image=["r.jpg"]), ("@\nSee <image_3> of the book", "r")),
    (asked("<image>?", file_name="r.jpg"), ("@?", "r")),
    (asked("<image> <image>?", file_names=["b.jpg", "r.jpg"]), ("@ @?", "br")),
    (asked("Of a page?", file_name="r.jpg"), ("Of a page?", "")),
    (asked("Of HTML?", "<image> is none", file_name="r.jpg"), ("Of HTML?", "")),
    (asked([source(type="base64", media_type="image/jpeg", data=BLUE), {"text": "?"}]),
     ("@?", "b")),
    (asked([source(type="url", url="r.jpg"), {"text": "?"}]), ("@?", "r")),
    (asked([{"type": "image", "base64": BLUE}, {"text": "?"}]), ("@?", "b")),
    (asked([{"type": "image", "base64": f"data:image/jpeg;base64,{BLUE}"}, {"text": "?"}]),
     ("@?", "b")),
    (asked([{"cache_control": {"type": "ephemeral"}, **source(type="url", url="r.jpg")}]),
     ("@", "r")),
    *((asked([{"type": "image", **option}, {"text": "?"}], images=["r.jpg"]), ("@?", "r"))
      for option in OPTIONS),
    (asked("Plain?", image={"bytes": None, "path": None}), ("Plain?", "")),
    (asked("Plain?", image=False, videos=0), ("Plain?", "")),
    ({"text": "Red.", "images": ["r.jpg"]}, ("@", "r")),
    ({"caption": "Red.", "image_paths": ["r.jpg"], "image": {"bytes": None}}, ("@", "r")),
    (asked("HTML's <img> and <b>r.jpg</b>"), ("HTML's <img> and <b>r.jpg</b>", "")),
]  # fmt: skip


@pytest.mark.parametrize(("record", "expected"), SHOWN)
def test_pictures_stand_where_the_marks_of_their_form_do(
    folder: Path, record: dict[str, Any], expected: tuple[str, str]
) -> None:
    (folder / "a.jsonl").write_text(json.dumps(record))
    assert run(folder / "a.jsonl")[1] == [expected]


ANSWERS = (
    "<channel><image>https://e.org/logo.png</image></channel>", "<img>icon.png</img>",
    "<img>r.jpg</img>", "<|vision_start|><|image_pad|><|vision_end|>", "<ImageHere>", "<image_1>",
    "<image 2>",
)  # fmt: skip
QUESTIONS: tuple[dict[str, Any], ...] = (
    {"text": "<image>\nWhat?", "images": ["r.jpg"]},
    {"text": "What?", "image": "r.jpg"},
    {"text": "<image_1>\nWhat?", "images": ["r.jpg"]},
    {"text": "<img>r.jpg</img>\nWhat?"},
    {"text": "What?", "own": {"image": "r.jpg"}},
)


def test_answers_that_write_like_marks_are_learned_as_they_are(folder: Path) -> None:
    records = [asked(answer=answer, **question) for answer in ANSWERS for question in QUESTIONS]
    records += [asked("What?", ANSWERS[0]), asked("What?", own={}, answer=ANSWERS[1])]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    summary, samples = run(folder / "a.jsonl")
    answers = [
        sample["messages"][-1]["content"] for _, sample in sorted(imported(folder / "out").items())
    ]
    assert summary.rejected == {}
    assert sorted(answers) == sorted([*ANSWERS * len(QUESTIONS), *ANSWERS[:2]])
    shown = {(text.replace("\n", ""), pictures) for text, pictures in samples}
    assert shown == {("@What?", "r"), ("What?", "")}


def test_marks_and_media_that_do_not_agree_are_refused_or_noted(folder: Path) -> None:
    records = [
        asked("<image_1> and <image_3>?", images=["r.jpg", "b.jpg"]),
        asked("<image_1>?", image=["r.jpg", "b.jpg"]),
        asked([part("r.jpg")], images=["b.jpg"]),
        asked("<image_1>, <ImageHere>?"),
        asked([{"type": "image", "blob": BLUE}], images=["r.jpg"]),
        asked([{"type": "image", "file": {"blob": BLUE}}], images=["r.jpg"]),
        asked("<image>Where?", "<bbox>", image="r.jpg", objects={"bbox": [[1, 2, 3, 4]]}),
        asked("<audio>?", audios=["a.wav"]),
        asked("<audio>?"),
        asked("<audio_7>?"),
        asked("Draw it.", "<image>", images=["r.jpg"]),  # a mark has no label
        asked("<video>?", videos=[["r.jpg", "b.jpg"]]),
    ]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    summary, samples = run(folder / "a.jsonl")
    assert summary.rejected == {
        "mark_media_mismatch": 2,
        "ambiguous_media": 1,
        "bad_schema": 4,
        "unknown_media": 1,
        "missing_text": 1,
    }
    texts = ("<image_1>, <ImageHere>?", "<audio>?", "<audio_7>?")
    assert samples == [(text, "") for text in texts]
    assert summary.notes == {
        "<audio> in a text, which stays text: the model takes no sound": 1,
        "<audio_N> in a text, which stays text: the model takes no sound": 1,
        "<image_N> in a record without media": 1,
        "<ImageHere> in a record without media": 1,
    }


def test_a_caption_of_several_pictures_is_refused(folder: Path) -> None:
    both = {"text": "Both.", "images": ["r.jpg", "b.jpg"]}
    records = [{"text": "None.", "images": 2}, both]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    summary, _ = run(folder / "a.jsonl")
    assert summary.rejected == {"ambiguous_media": 1}
    assert summary.notes == {"unused field images": 1}
    records = [both, {"text": "None.", "images": []}, {"text": "Red.", "images": ["../r.jpg"]}]
    (folder / "in").mkdir()
    (folder / "in" / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    summary, samples = run(folder / "in" / "a.jsonl")
    assert summary.rejected == {"ambiguous_media": 1, "missing_file": 1}
    assert samples == [("@", "r")]


def test_parts_of_a_record_in_a_shard_name_its_members(folder: Path) -> None:
    record = asked([part("b.jpg"), {"type": "text", "text": "?"}])
    members = {
        "a.r.jpg": jpeg("red"),
        "a.b.jpg": jpeg("blue"),
        "a.json": json.dumps(record).encode(),
    }
    write_tar(folder / "a.tar", members)
    summary, samples = run(folder / "a.tar")
    assert samples == [("@?", "b")]
    assert summary.notes == {"unused member .r.jpg": 1}


def test_a_message_of_a_shard_may_repeat_a_medium_of_its_record(folder: Path) -> None:
    record = asked("<image><image>?", own={"image": "b.jpg"}, images=["./r.jpg", "b.jpg"])
    (folder / "a.json").write_text(json.dumps(record))
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name in ("r.jpg", "b.jpg"):
            tar.add(folder / name, f"a.{name}")
        tar.add(folder / "a.json", "a.json")
    assert run(folder / "a.tar")[1] == [("@@?", "rb")]


def test_paths_in_a_text_are_the_places_of_bytes_in_their_order() -> None:
    pictures = [{"bytes": jpeg("red"), "path": None}, {"bytes": jpeg("blue"), "path": None}]
    draft = conversation_draft(asked("<img>1.jpg</img> or <img>2.jpg</img>?", images=pictures), "")
    assert draft.messages[0]["content"] == "<|image|> or <|image|>?"
    assert [medium.content for medium in draft.media] == [jpeg("red"), jpeg("blue")]
