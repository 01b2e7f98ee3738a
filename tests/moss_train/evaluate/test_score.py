"""Scores of hand-written cases."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moss_train.evaluate.generate import answers
from moss_train.evaluate.items import EvaluationError, read_lines
from moss_train.evaluate.score import (
    Score,
    Timeline,
    _count,
    _f1,
    caption_scores,
    decisions,
    plain,
    question_scores,
    questions_together,
)
from moss_train.evaluate.suite import table, toy_items


def test_answers_are_compared_without_case_spaces_and_stop() -> None:
    assert plain(" The  Red circle. ") == plain("the red circle")
    assert plain("Two") != plain("Too")


def test_f1_of_speaking() -> None:
    truth = torch.tensor([True, True, True, False, False])
    said = torch.tensor([True, True, False, True, False])
    assert _f1(said, truth) == pytest.approx(2 / 3)  # precision 2/3, recall 2/3
    assert _f1(truth, truth) == 1
    assert _f1(~truth, truth) == 0


def test_events_in_time_right_words_and_false_alarms(live) -> None:
    item = next(item for item in live if not item.options)
    wanted = [(0, "A red circle."), (3, "The red circle leaves."), (6, "A blue cross comes.")]
    spoken = [
        (0, "A red circle."),
        (4, "The red square leaves."),  # in time, with a wrong word
        (5, "A blue cross comes."),  # before it happened
        (8, "A blue cross comes."),  # two seconds late
    ]
    counts = _count([item], [Timeline("k", 10, wanted, spoken)])
    assert counts["events"] == 3
    assert counts["in_time"] == 2
    assert counts["right"] == 1
    assert counts["false"] == 2
    assert counts["minutes"] == pytest.approx(10 / 60)


def test_an_answer_in_the_middle_is_neither_an_event_nor_a_false_alarm(live) -> None:
    item = next(item for item in live if item.options)
    asked = item.sample.messages[1].content.count("<|video|>") - 1
    right = item.sample.messages[3].content.partition("<|")[0]
    counts = _count([item], [Timeline("k", 10, [], [(asked, right)])])
    assert (counts["questions"], counts["answered"], counts["false"]) == (1, 1, 0)
    counts = _count([item], [Timeline("k", 10, [], [(asked, "Nonsense."), (asked + 1, "Oh.")])])
    assert (counts["questions"], counts["answered"], counts["false"]) == (1, 0, 1)


def test_decisions_are_those_after_frames_of_the_model_s_turns(model, live) -> None:
    for item in live:
        content = "".join(m.content for m in item.sample.messages if m.role == "assistant")
        after = content.split("<|video|>")[1:]
        expected = [not part.startswith("<|silence|>") for part in after]
        assert decisions(model, item, item.encoded.labels[1:]).tolist() == expected


def test_chance_is_that_of_the_options_and_all_tasks_are_listed(model, questions) -> None:
    item = questions[0]
    three = replace(item, options=("Yes.", "No.", "Red.", "Two."), task="a")
    two = replace(item, options=("Yes.", "No."), task="b")
    found, answered = question_scores(model, [three, two])
    scores = {score.metric.strip(): score for score in found}
    assert [a.wanted for a in answered] == [item.answer] * 2
    assert answered[0].said == answers(model, [item])[0]
    assert answered[0].asked.endswith("?")
    assert "<" not in answered[0].asked
    assert scores["answers exact"].chance == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert scores["a"].chance == 0.25
    assert scores["b"].count == 1
    assert scores["multiple choice"].count == 2


def test_questions_of_all_sources_weigh_alike() -> None:
    text = Score("a/text", "answers exact", 0.5, 0.5, 0.25, 2)
    clips = Score("a/video", "answers exact", 1.0, 0.0, 0.5, 6)
    other = Score("a/video", "  colour", 0.0, 0.0, 0.0, 4)
    (both,) = questions_together([text, clips, other])
    assert both == Score("all sources", "answers exact", 7 / 8, 1 / 8, 7 / 16, 8)
    assert questions_together([clips, other]) == []


def test_chance_of_captions_is_the_most_frequent_token(model, questions) -> None:
    labels = [item.encoded.labels[item.encoded.labels >= 0].tolist() for item in questions]
    tokens = [token for row in labels for token in row]
    (score,) = caption_scores(model, questions)
    most = max(tokens.count(token) for token in tokens)
    assert score.chance == pytest.approx(most / len(tokens))


def test_lines_of_json_with_files_beside_them(model, tmp_path: Path) -> None:
    from data_pipeline.toy.render import jpeg
    from data_pipeline.toy.world import still

    (tmp_path / "a.jpg").write_bytes(jpeg(still(1), 56))
    turns = [
        {"role": "user", "content": "<|image|>Is it red?"},
        {"role": "assistant", "content": "Yes."},
    ]
    line = {"messages": turns, "media": [{"type": "image", "file": "a.jpg"}], "options": ["Yes."]}
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(line) + "\n\n")
    (item,) = read_lines(path, model.encoder)
    assert (item.source, item.task, item.options, item.answer) == (
        "mine",
        "chat",
        ("Yes.",),
        "Yes.",
    )
    assert len(item.encoded.frames) == 1
    path.write_text(json.dumps(line) + "\n" + json.dumps(line).replace("a.jpg", "b.jpg"))
    with pytest.raises(EvaluationError, match=r"mine.jsonl:2: .*b.jpg"):
        list(read_lines(path, model.encoder))
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(EvaluationError, match=r"mine.jsonl: cannot be read: .*utf-8"):
        list(read_lines(path, model.encoder))


def test_a_toy_world_that_is_not_there(model, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="renders it"):
        toy_items(model, None, [], tmp_path)
    assert len(toy_items(model, 2, ["sft", "realtime_sft"])) == 12


def test_the_table_shows_what_there_is() -> None:
    lines = table([Score("sft/image", "exact", 0.5, None, 0.25, 4)]).splitlines()
    assert lines[2].split() == ["sft/image", "exact", "0.500", "0.250", "4"]
