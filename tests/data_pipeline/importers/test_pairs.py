"""Pairs of a question and its answer (The Cauldron, FineVision, ms-swift) and names of roles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from data_pipeline.importers.conversation import conversation_draft
from data_pipeline.schema import SampleError
from data_pipeline.video import frames_at, probe_video
from tests.data_pipeline.clips import number
from tests.data_pipeline.importers.realtime import run, said, write
from tests.samples import write_tar


@pytest.fixture
def pictures(tmp_path: Path) -> list[bytes]:
    """Of `in/1.png` and `in/2.png`."""
    (tmp_path / "in").mkdir(exist_ok=True)
    for name, color in (("1", "red"), ("2", "blue")):
        Image.new("RGB", (12, 8), color).save(tmp_path / f"in/{name}.png")
    return [(tmp_path / f"in/{name}.png").read_bytes() for name in ("1", "2")]


def pair(user: Any, assistant: Any) -> dict[str, Any]:
    return {"user": user, "assistant": assistant, "source": "VQAv2"}


def test_the_cauldrons_pictures_stand_before_its_first_question(
    pictures: list[bytes], tmp_path: Path
) -> None:
    rows = [
        {"images": [{"bytes": data, "path": None} for data in pictures],
         "texts": [pair("Same?", "No."), pair("Which is red?", "The first.")],
         "source": "set", "relevance_ratings": [5, 4], "formatting_min": 4},
        {"images": [], "texts": [pair("1 + 1?", "2.")],
         "source": None, "relevance_ratings": [], "formatting_min": None},
        {"images": [], "texts": [pair("1 + 1?", "")],
         "source": None, "relevance_ratings": [], "formatting_min": None},
    ]  # fmt: skip
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "in/train-00000-of-00001.parquet")
    samples, summary = run(tmp_path / "in/train-00000-of-00001.parquet")
    assert [said(sample) for sample in samples] == [
        ["<|image|><|image|>Same?", "No.", "Which is red?", "The first."], ["1 + 1?", "2."],
    ]  # fmt: skip
    assert list(samples[0]["members"].values()) == pictures
    assert summary.rejected == {"missing_text": 1}
    assert summary.notes == {
        "unused field relevance_ratings": 1, "unused field formatting_min": 1,
        "unused field source": 1, "unused field texts[].source": 3,
    }  # fmt: skip


def test_marks_of_pairs_place_their_pictures(pictures: list[bytes], tmp_path: Path) -> None:
    asked = [pair("Red?", "No."), pair("And <image>?", "Yes.")]
    source = write(
        tmp_path / "in/r.jsonl",
        {"images": ["1.png"], "texts": asked},
        {"images": ["1.png", "2.png"], "texts": asked},
        {"images": ["1.png"], "texts": [pair("Red?", None)]},
        {"images": ["1.png"], "texts": ["Red?"]},
        {"images": ["1.png"], "texts": []},
    )
    (sample,), summary = run(source)
    assert said(sample) == ["Red?", "No.", "And <|image|>?", "Yes."]
    assert summary.rejected == {"mark_media_mismatch": 1, "bad_schema": 2, "missing_text": 1}
    record = json.dumps({"texts": asked}).encode()
    write_tar(tmp_path / "in/s.tar", {"1.png": pictures[0], "1.json": record})
    (sample,), _ = run(tmp_path / "in/s.tar")
    assert said(sample) == ["Red?", "No.", "And <|image|>?", "Yes."]
    assert sample["members"] == {"0.png": pictures[0]}


def test_ms_swifts_history_stands_before_its_query(
    pictures: list[bytes], tmp_path: Path, clip: Path
) -> None:
    (tmp_path / "in/a.mp4").write_bytes(clip.read_bytes())
    history = [["<image>Red?", "Yes."], ["Why?", "It is."]]
    source = write(
        tmp_path / "in/r.jsonl",
        {"query": "And <image>?", "response": "Blue.", "history": history, "system": "Be brief.",
         "images": ["1.png", "2.png"]},
        {"query": "Same?", "response": "No.", "images": ["1.png", "2.png"], "history": []},
        {"query": "<video>What moves?", "response": "A bar.", "videos": ["a.mp4"]},
        {"query": "What moves?", "response": "A bar.", "videos": "a.mp4", "history": None},
        {"query": "1 + 1?", "response": "2."},
        {"query": "1 + 1?", "response": "2.", "rejected_response": "3."},
        {"query": "1 + 1?", "response": "2.", "history": [["1 + 0?"]]},
        {"query": "<image>Same?", "response": "No.", "images": ["1.png", "2.png"]},
    )  # fmt: skip
    samples, summary = run(source)
    assert [said(sample) for sample in samples] == [
        ["Be brief.", "<|image|>Red?", "Yes.", "Why?", "It is.", "And <|image|>?", "Blue."],
        ["<|image|><|image|>Same?", "No."],
        ["<|video|>What moves?", "A bar."],
        ["<|video|>What moves?", "A bar."],
        ["1 + 1?", "2."],
    ]
    assert list(samples[0]["members"].values()) == pictures
    assert samples[0]["messages"][0]["role"] == "system"
    assert summary.rejected == {"preference_data": 1, "bad_schema": 1, "mark_media_mismatch": 1}
    (tmp_path / "in/r.csv").write_text(
        'query,response,history\nWhy?,{"a": 1},"[[""Red?"", ""Yes.""]]"\n'
    )
    (sample,), _ = run(tmp_path / "in/r.csv")
    assert said(sample) == ["Red?", "Yes.", "Why?", '{"a": 1}']


@pytest.mark.parametrize("asks", ["user", "User", "HUMAN", "Human"])
@pytest.mark.parametrize("answers", ["Assistant", "GPT", "model", "Model", "bot", "ai", "ChatGPT"])
def test_roles_are_known_in_any_letter_case(asks: str, answers: str) -> None:
    record = {"messages": [{"role": "System", "content": "Be brief."},
                           {"role": asks, "content": "Red?"},
                           {"role": answers, "content": "Yes.", "images": ["a.png"]}]}  # fmt: skip
    draft = conversation_draft(record, "")
    assert [turn["role"] for turn in draft.messages] == ["system", "user", "assistant"]
    # What a model has said gets no mark, whatever it is called.
    assert [turn["content"] for turn in draft.messages] == ["Be brief.", "Red?", "Yes."]
    assert draft.notes == ("unused field messages[].images",)


def test_ms_swifts_calls_of_tools_are_learned_and_their_answers_are_not() -> None:
    said = [("user", "Weather?"), ("tool_call", '{"name": "weather"}'), ("tool_response", "21 C"),
            ("assistant", "It is 21 C.")]  # fmt: skip
    record = {"messages": [{"role": role, "content": content} for role, content in said]}
    roles = [turn["role"] for turn in conversation_draft(record, "").messages]
    assert roles == ["user", "assistant", "user", "assistant"]


def test_roles_that_nobody_knows_are_named() -> None:
    for role in ("Narrator", ["user"], None):
        record = {"messages": [{"role": role, "content": "Once."}]}
        with pytest.raises(SampleError) as raised:
            conversation_draft(record, "")
        assert raised.value.detail.startswith(f"messages[0].role: {role!r}: not of system, ")


def test_turns_of_a_stream_have_roles_in_any_letter_case(folder: Path) -> None:
    turns = [{"role": "User", "content": "<0s-1s> What moves? <stream>"},
             {"role": "Assistant", "content": "</Response> A bar."}]  # fmt: skip
    talk = [{"role": "User", "content": "What moves?", "time": 0},
            {"role": "Assistant", "content": "A bar.", "time": 1}]  # fmt: skip
    source = write(folder / "r.jsonl", {"messages": turns, "videos": ["a.mp4"]},
                   {"conversation": talk, "video_uid": "a"})  # fmt: skip
    samples, _ = run(source)
    assert [sample["kind"] for sample in samples] == ["realtime", "realtime"]
    assert ["A bar." in "".join(said(sample)) for sample in samples] == [True, True]


def test_videochats_and_timechats_pairs_are_turns(pictures: list[bytes], folder: Path) -> None:
    """`i` is said before its question, once; a caption's question is empty."""
    source = write(
        folder / "r.jsonl",
        {"video": "a.mp4", "QA": [{"i": "Look.", "q": "What?", "a": "A bar."},
                                  {"i": "Look.", "q": "And now?", "a": "Two."}]},
        {"image": "1.png", "QA": [{"i": "Describe it.", "q": "", "a": "Red."}]},
        {"video": "a.mp4", "start": 2.0, "end": 6.0, "source": "set",
         "QA": [{"q": "When?", "a": "1 - 2 seconds."}]},
        {"video": "a.mp4", "QA": [{"q": "When?", "a": None}]},
    )  # fmt: skip
    *samples, part = (run(source))[0]
    assert [said(sample) for sample in (*samples, part)] == [
        ["<|video|>Look.\nWhat?", "A bar.", "And now?", "Two."],
        ["<|image|>Describe it.", "Red."],
        ["<|video|>When?", "1 - 2 seconds."],
    ]
    assert samples[1]["members"] == {"0.png": pictures[0]}
    cut = part["members"]["0.mp4"]
    assert probe_video(cut).duration == pytest.approx(4.0, abs=0.05)
    assert [number(frame.permute(1, 2, 0)) for frame in frames_at(cut, [0.0, 3.9])] == [10, 29]


def test_a_question_and_its_answer_are_a_conversation(pictures: list[bytes], folder: Path) -> None:
    source = write(
        folder / "r.jsonl",
        {"q": "What moves?", "a": "A bar.", "video_id": "a"},  # Video-ChatGPT
        {"input": "1 + 1?", "output": "2.", "system": "Add."},
        {"problem": "<image>Red?", "solution": "Yes.", "image": "1.png"},
        {"prompt": "Go on:", "completion": "and on.", "history": [["Begin.", "On"]]},
        {"question": "Who?", "answer": "He.", "context": "He came."},
        {"question": "Which?", "answer": "a", "choices": ["a", "b"]},
        {"question": "Red?", "answer": "Yes.", "img_path": "1.png"},
    )
    samples, summary = run(source)
    assert sorted(map(said, samples)) == [
        ["<|image|>Red?", "Yes."], ["<|video|>What moves?", "A bar."],
        ["Add.", "1 + 1?", "2."], ["Begin.", "On", "Go on:", "and on."],
    ]  # fmt: skip
    assert summary.rejected == {"bad_schema": 2, "missing_file": 1}
