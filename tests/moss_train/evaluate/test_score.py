"""Scores of hand-written cases."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.schema import Message, SampleError
from data_pipeline.toy.render import jpeg
from data_pipeline.toy.world import still
from moss_train.data_config import CONTROLS
from moss_train.evaluate.controls import ALL_FRAMES, BLIND, SHUFFLED, watch
from moss_train.evaluate.generate import answers
from moss_train.evaluate.items import EvaluationError, suite_samples
from moss_train.evaluate.outcomes import Outcome, decisions, is_right, outcomes, plain
from moss_train.evaluate.score import (
    Score,
    Timeline,
    _count,
    _f1,
    caption_scores,
    question_scores,
    questions_together,
)
from moss_train.evaluate.suite import evaluate, table, toy_items
from tests.samples import write_tar


def test_answers_are_compared_without_case_spaces_and_stop() -> None:
    assert plain(" The  Red circle. ") == plain("the red circle")
    assert plain("Two") != plain("Too")


def test_an_answer_that_says_what_was_seen_is_compared_by_its_last_sentence(questions) -> None:
    key = replace(questions[0].answer_key(), options=("Red.", "Blue.", "Yes. Red."))
    turns = [*key.sample.messages[:-1], Message("assistant", "Red, blue. Red.")]
    key = replace(key, sample=replace(key.sample, messages=turns))
    assert is_right(key, "Blue, green. red")
    assert is_right(key, "Red.")
    assert not is_right(key, "Red, blue. Blue.")
    assert not is_right(key, "Red. Blue, red.")
    assert not is_right(key, "")
    whole = replace(key, options=("Red, blue. Red.", "Red."))  # the answer is itself an option
    assert is_right(whole, "red,  blue. Red")
    assert not is_right(whole, "Blue, green. Red.")
    assert not is_right(replace(key, options=()), "Blue, green. Red.")  # free text


def test_options_are_compared_by_likelihood_only_where_the_answer_is_one(model, questions) -> None:
    item = questions[0]
    explains = replace(item, options=tuple(f"{option[:-1]}!" for option in ("Yes.", "No.")))
    closed = replace(item, options=("Yes.", item.answer))
    found = outcomes(model, [explains, closed], ())
    assert [own.picked.keys() for own in found] == [set(), {ALL_FRAMES}]


def test_tasks_of_a_group_are_scored_together_too(live) -> None:
    key = live[0].answer_key()
    found = [
        Outcome(replace(key, task=task, options=(key.answer, "No.")), 1, answers={ALL_FRAMES: said})
        for task, said in (
            ("time/first", key.answer), ("time/before", "No."), ("timely", key.answer),
        )
    ]  # fmt: skip
    scores = [(s.metric.strip(), s.value, s.count) for s in question_scores(found)[0]]
    assert scores == [
        ("answers exact", 2 / 3, 3), ("time", 1 / 2, 2), ("time/before", 0, 1),
        ("time/first", 1, 1), ("timely", 1, 1),
    ]  # fmt: skip


def test_f1_of_speaking() -> None:
    truth = [True, True, True, False, False]
    said = [True, True, False, True, False]
    assert _f1(said, truth) == pytest.approx(2 / 3)  # precision 2/3, recall 2/3
    assert _f1(truth, truth) == 1
    assert _f1([not right for right in truth], truth) == 0


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
    # Of three sentences to be said and four that were, one agrees: precision 1/4, recall 1/3.
    assert counts["agreed"] / counts["told"] == pytest.approx(2 / (4 + 3))


def test_an_answer_in_the_middle_is_neither_an_event_nor_a_false_alarm(live) -> None:
    item = asked(next(item for item in live if item.options), "Top left.<|silence|><|video|>Oh.")
    counts = _count([item], [Timeline("k", 10, [], [(2, "Top left.")])])
    assert (counts["questions"], counts["answered"], counts["false"]) == (1, 1, 0)
    assert counts["told"] == 0
    counts = _count([item], [Timeline("k", 10, [], [(2, "Nonsense."), (3, "Oh.")])])
    assert (counts["questions"], counts["answered"], counts["false"]) == (1, 0, 1)


@pytest.mark.parametrize(
    ("answer", "second"),
    [
        ("<|video|>Top left.<|silence|><|video|><|silence|>", 3),
        ("<|video|><|silence|><|video|>Top left.<|silence|>", 4),
        ("Top<|video|> left.<|silence|><|video|>Now it is gone.<|silence|>", 2),
        ("Top left<|video|>.<|silence|>", 2),
    ],
)
def test_an_answer_begins_with_a_frame_or_has_one_within(live, answer, second) -> None:
    item = asked(next(item for item in live if item.options), answer)
    for at in range(1, 6):
        counts = _count([item], [Timeline("k", 10, [], [(at, "Top left.")])])
        assert (counts["answered"], counts["false"]) == ((1, 0) if at == second else (0, 1))
    counts = _count([item], [Timeline("k", 10, [], [(second, "Top")])])
    assert (counts["answered"], counts["false"]) == (0, 0)


def asked(item, answer: str):
    """`item` with a question after the third frame, seconds 0 to 2, and this answer."""
    texts = {1: "<|video|><|silence|>" * 3, 3: answer}
    turns = [
        Message(turn.role, texts.get(number, turn.content))
        for number, turn in enumerate(item.sample.messages)
    ]
    return replace(item.answer_key(), sample=replace(item.sample, messages=turns))


def test_decisions_are_those_after_frames_of_the_model_s_turns(model, live) -> None:
    for item in live:
        content = "".join(m.content for m in item.sample.messages if m.role == "assistant")
        after = content.split("<|video|>")[1:]
        expected = [not part.startswith("<|silence|>") for part in after]
        assert decisions(model, item, item.encoded.labels[1:]).tolist() == expected


def test_chance_is_that_of_the_options_and_all_tasks_are_listed(model, questions) -> None:
    item = questions[0]
    three = replace(item, options=("Yes.", "No.", "Red.", item.answer), task="a")
    two = replace(item, options=("Yes.", item.answer), task="b")
    found, answered = question_scores(outcomes(model, [three, two], CONTROLS))
    scores = {score.metric.strip(): score for score in found}
    assert [a.wanted for a in answered] == [item.answer] * 2
    assert answered[0].said == answers(model, watch(model, [item]))[0]
    assert answered[0].asked.endswith("?")
    assert "<" not in answered[0].asked
    assert scores["answers exact"].chance == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert scores["a"].chance == 0.25
    assert scores["b"].count == 1
    assert scores["multiple choice"].count == 2
    assert all(getattr(score, name) is not None for score in found for name in CONTROLS)
    closed, _ = question_scores(outcomes(model, [three, two], (), generates=False))
    assert [(score.metric, score.blind, score.shuffled) for score in closed] == [
        ("multiple choice", None, None)
    ]
    assert closed[0].value == scores["multiple choice"].value


def test_questions_of_all_sources_weigh_alike() -> None:
    text = Score("a/text", "answers exact", 0.5, 0.5, 0.25, 2)
    clips = Score("a/video", "answers exact", 1.0, 0.0, 0.5, 6)
    other = Score("a/video", "  colour", 0.0, 0.0, 0.0, 4)
    (both,) = questions_together([text, clips, other])
    assert both == Score("all sources", "answers exact", 7 / 8, 1 / 8, 7 / 16, 8)
    assert questions_together([clips, other]) == []


def test_captions_count_tokens_and_their_chance_is_the_most_frequent_one(live) -> None:
    key = live[0].answer_key()
    found = [
        Outcome(key, 1, labels=[5, 6, 5, 7], hits={ALL_FRAMES: 3, BLIND: 1, SHUFFLED: 3}),
        Outcome(key, 1, labels=[5, 8], hits={ALL_FRAMES: 1, BLIND: 1, SHUFFLED: 1}),
    ]
    (score,) = caption_scores(found)
    expected = Score(key.source, "caption token accuracy", 4 / 6, 2 / 6, 3 / 6, 2)
    assert score == expected  # no order of a single frame is another one
    found[0].frames = 2
    (score,) = caption_scores(found)
    assert score == replace(expected, shuffled=4 / 6)


def test_lines_of_json_with_files_beside_them(model, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(still(1), 56))
    turns = [
        {"role": "user", "content": "<|image|>Is it red?"},
        {"role": "assistant", "content": "Yes."},
    ]
    line = {"messages": turns, "media": [{"type": "image", "file": "a.jpg"}], "options": ["Yes."]}
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(line) + "\n\n")
    (item,) = suite_samples(path, "mine", model.encoder, 1)
    assert (item.source, item.task, item.options, item.answer) == (
        "mine",
        "chat",
        ("Yes.",),
        "Yes.",
    )
    assert len(item.encoded.frames) == 1
    # A text in a line may have other ends of lines; editors write a byte order mark.
    question = "<|image|>Is\u2028it\x85red?"
    odd = {**line, "messages": [{**turns[0], "content": question}, turns[1]]}
    path.write_bytes(("\ufeff" + json.dumps(odd, ensure_ascii=False) + "\r\n").encode())
    (item,) = suite_samples(path, "mine", model.encoder)
    assert item.sample.messages[0].content == question
    path.write_text(json.dumps(line) + "\n" + json.dumps({**line, "messages": turns[:1]}))
    with pytest.raises(SampleError, match=r"mine.jsonl:2: bad_schema: messages: no assistant"):
        list(suite_samples(path, "mine", model.encoder))
    nothing = [turns[0], {"role": "assistant", "content": " "}]
    path.write_text(json.dumps(line) + "\n" + json.dumps({**line, "messages": nothing}))
    with pytest.raises(EvaluationError, match=r"mine.jsonl:2: messages\[1\]: the answer is empty"):
        list(suite_samples(path, "mine", model.encoder))
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(EvaluationError, match=r"mine.jsonl: cannot be read: .*utf-8"):
        list(suite_samples(path, "mine", model.encoder))


def test_shards_that_others_wrote(model, tmp_path: Path) -> None:
    """With folders, files of macOS, names with dots, other letter case; one that is torn."""
    turns = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}]
    record = json.dumps({"messages": turns}).encode()
    folder, shard = tmp_path / "mine", tmp_path / "mine/a.tar"
    folder.mkdir()
    with tarfile.open(shard, "w") as tar:
        made = tarfile.TarInfo("v1.0")
        made.type = tarfile.DIRTYPE
        tar.addfile(made)
        for name in ("v1.0/a.json", "v1.0/._a.json", "v1.0/b.JSON"):
            member = tarfile.TarInfo(name)
            member.size = len(record)
            tar.addfile(member, io.BytesIO(record))
    found = list(suite_samples(folder, "mine", model.encoder))
    assert [item.key for item in found] == ["mine/v1.0/a", "mine/v1.0/b"]
    assert [item.answer for item in found] == ["Yes.", "Yes."]
    assert len(list(suite_samples(folder, "mine", model.encoder, 1))) == 1
    shard.write_bytes(shard.read_bytes()[:2600])  # in the middle of a member
    with pytest.raises(EvaluationError, match=r"a\.tar: is damaged: "):
        list(suite_samples(folder, "mine", model.encoder))
    write_tar(shard, {"c.txt": b"A circle."})
    with pytest.raises(SampleError, match=r"mine/c: missing_json: members: txt"):
        list(suite_samples(folder, "mine", model.encoder))


def test_a_sample_without_its_file_is_counted_and_named(model, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(still(1), 56))
    turns = [
        {"role": "user", "content": "<|image|>Is it red?"},
        {"role": "assistant", "content": "Yes."},
    ]
    media = [{"type": "image", "file": "a.jpg"}]
    line = json.dumps({"messages": turns, "media": media})
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join((line, line.replace("a.jpg", "b.jpg"), line)))
    result = evaluate(model, suite_samples(path, "mine", model.encoder))
    assert {score.count for score in result.scores} == {2}
    (left,) = result.left_out
    assert left == f"{path}:2: missing_media: {tmp_path / 'b.jpg'} is not there"
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(EvaluationError, match=r"none of 3 samples can be used: .*a.jpg"):
        evaluate(model, suite_samples(path, "mine", model.encoder))


def test_a_toy_world_that_is_not_there(model, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="renders it"):
        toy_items(model, None, [], tmp_path)
    assert len(toy_items(model, 2, ["sft", "realtime_sft"])) == 12


def test_the_table_shows_what_there_is() -> None:
    lines = table([Score("sft/image", "exact", 0.5, None, 0.25, 4)]).splitlines()
    assert lines[2].split() == ["sft/image", "exact", "0.500", "0.250", "4"]
    lines = table([Score("sft/video", "exact", 0.5, 0.1, 0.25, 4, 0.375, 0.4)]).splitlines()
    assert lines[0].split()[2:] == ["model", "blind", "one", "frame", "shuffled", "chance", "of"]
    assert lines[2].split()[2:] == ["0.500", "0.100", "0.375", "0.400", "0.250", "4"]
