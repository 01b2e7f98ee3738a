from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.schema import MARK, SampleError, member_named, parse_sample


def _data(content: str, media: list[dict[str, Any]], kind: str = "chat") -> dict[str, Any]:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]
    return {"messages": messages, "media": media, "kind": kind}


IMAGE = {"type": "image", "file": "0.jpg"}
VIDEO = {"type": "video", "file": "1.mp4"}


def test_marks_meet_their_media_in_order() -> None:
    sample = parse_sample("k", json.dumps(_data("<|image|> and <|video|>?", [IMAGE, VIDEO])))
    assert [medium.file for medium in sample.media] == ["0.jpg", "1.mp4"]
    assert sample.mark_media() == [0, 1]


@pytest.mark.parametrize("answer", ["", " \n", "<|image|>", "<|image|> <|image|>"])
def test_an_answer_without_text_is_none_but_in_a_stream_and_as_context(answer: str) -> None:
    media = [IMAGE | {"file": f"{i}.jpg"} for i in range(len(MARK.findall(answer)))]
    data = _data("Show it.", media)
    asked, said = data["messages"]
    for kind in ("chat", "caption"):
        with pytest.raises(SampleError, match=r"missing_text: messages\[3\]: the assistant's turn"):
            parse_sample("k", data | {"kind": kind, "messages": [
                asked, said, asked, said | {"content": answer}]})  # fmt: skip
    context = said | {"content": answer, "learn": False}
    parse_sample("k", data | {"messages": [asked, context, asked, said]})
    parse_sample("k", data | {"kind": "realtime", "messages": [asked, said | {"content": answer}]})


def test_a_member_is_found_as_it_is_written_then_in_another_letter_case() -> None:
    assert member_named("0.JPG", ["0.jpg", "0.JPG"]) == "0.JPG"
    assert member_named("0.JPG", ["json", "0.jpg"]) == "0.jpg"
    assert member_named("0.jpg", ["0.JPG"]) == "0.JPG"
    assert member_named("0.jpg", ["0.jpeg", "10.jpg"]) is None


def test_all_video_marks_of_a_realtime_sample_belong_to_its_clip() -> None:
    text = "<|video|><|image|><|video|>"
    sample = parse_sample("k", _data(text, [IMAGE, VIDEO], "realtime"))
    assert sample.mark_media() == [1, 0, 1]


@pytest.mark.parametrize(
    ("data", "reason", "said"),
    [
        (b"{", "bad_json", "Expecting"),
        (b"\xff\xfe{", "bad_json", "decode"),
        (b"[]", "bad_schema", "list"),
        ({"messages": "hi"}, "bad_schema", "messages"),
        ({"messages": [{"role": "robot", "content": ""}]}, "bad_schema", r"messages\[0\].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "bad_schema", r"messages\[0\].content"),
        ({"messages": [{"role": "user", "content": "a"}]}, "bad_schema", "no assistant turn"),
        (_data("", [], "poem"), "bad_schema", "kind: 'poem'"),
        (_data("", [{"type": "sound", "file": "a"}]), "bad_schema", r"media\[0\].type"),
        (_data("", [{"type": "image"}]), "bad_schema", r"media\[0\].file"),
        (_data("<|image|>", []), "mark_media_mismatch", r"marks \[image\], the media are \[\]"),
        (_data("", [IMAGE]), "mark_media_mismatch", r"media are \[image\]"),
        (_data("<|video|><|image|>", [IMAGE, VIDEO]), "mark_media_mismatch", "video, image"),
        (_data("", [VIDEO], "realtime"), "mark_media_mismatch", "1.mp4 has no"),
        (
            _data("<|video|>", [{**VIDEO, "times": [0, 1]}], "realtime"),
            "mark_media_mismatch",
            "2 times",
        ),
        (
            _data("<|video|><|video|>", [{**VIDEO, "times": [1, 0]}], "realtime"),
            "bad_schema",
            r"media\[0\].times",
        ),
    ],
)
def test_what_is_wrong_is_named(data: Any, reason: str, said: str) -> None:
    with pytest.raises(SampleError, match=said) as caught:
        parse_sample("the-key", data)
    assert (caught.value.key, caught.value.reason) == ("the-key", reason)


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["messages", "media", "kind", "role", "content", "type", "file"]),
            inner | st.sampled_from(["user", "assistant", "image", "video", "<|video|>"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(_JSON | st.binary(max_size=40))
def test_nothing_but_a_sample_error_comes_out(data: Any) -> None:
    raw = data if isinstance(data, bytes) else json.dumps(data)
    with contextlib.suppress(SampleError):
        sample = parse_sample("k", raw)
        text = "".join(message.content for message in sample.messages)
        assert len(sample.mark_media()) == len(MARK.findall(text))
