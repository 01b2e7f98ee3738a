"""A file in another form is refused by its name, with the entry and the fields; words of others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inference.evaluate.streaming.config import StreamingConfig
from inference.evaluate.streaming.forms import FormError
from inference.evaluate.streaming.items import Emission, Reply, Watched
from inference.evaluate.streaming.judge import no_judge
from inference.evaluate.streaming.selection import select
from inference.evaluate.streaming.streamingbench import StreamingBench
from inference.evaluate.streaming.templates import describe_own, read_templates
from inference.evaluate.streaming.text import choice, contains_phrase, last_number, letter
from inference.evaluate.streaming.timing import Timing
from tests.inference.evaluate.streaming.published import WRITERS, write_streamingbench

Change = Callable[[Any], Any]


def broken(folder: Path, name: str, file: str, change: Change) -> str:
    """What is said of a published file that was changed."""
    WRITERS[name](folder)
    path = folder / file
    data = json.loads(path.read_text())
    path.write_text(json.dumps(change(data) or data))
    with pytest.raises(FormError) as error:
        select(StreamingConfig(benchmarks=(f"{name}={folder}",)))
    return str(error.value).replace(f"{folder}/", "")


@pytest.mark.parametrize(
    ("name", "file", "change", "said"),
    [
        ("ovobench", "ovo_bench_new.json", lambda d: d[1].pop("gt") and d[1].pop("video") and None,
         "ovo_bench_new.json, entry 1: missing video, gt (it has answer, id,"),
        ("ovobench", "ovo_bench_new.json", lambda d: d[0].update(gt=7),
         "entry 0: gt: 7 is not the number of an option"),
        ("ovobench", "ovo_bench_new.json", lambda d: d[0].update(task="XYZ"),
         "entry 0: task: 'XYZ' is not a task of OVO-Bench"),
        ("ovobench", "ovo_bench_new.json", lambda d: d[18]["test_info"][2].pop("count") and None,
         "entry 18, test_info[2]: missing count (it has realtime)"),
        ("ovobench", "ovo_bench_new.json", lambda d: {"entries": d}, "expected a list of entries"),
        ("streamingbench", "questions_real.json",
         lambda d: d[1]["questions"][0].update(time_stamp="soon"),
         "questions_real.json, entry 1, questions[0]: time_stamp: must be a time, it is 'soon'"),
        ("streamingbench", "questions_sqa.json", lambda d: d[0],
         "questions_sqa.json, entry 0: expected a list of the questions about a video"),
        ("streamingbench", "questions_omni.json", lambda d: d[0]["questions"][0].pop("options")[:0],
         "entry 0, questions[0]: missing options"),
        ("omnimmi", "proactive_alerting.json", lambda d: d[1].update(answer=[3]),
         "proactive_alerting.json, entry 1: answer: must be two seconds, it is [3]"),
        ("omnimmi", "dynamic_state_grounding.json", lambda d: d[0].update(qa="none"),
         "entry 0: qa: must be a list, it is 'none'"),
        ("proactivevideoqa", "EGO/anno.json",
         lambda d: d[0]["answer"][1].update(reply_timespan=[24, 24]),
         "entry 0, answer[1]: reply_timespan: 24 to 24 is empty"),
        ("proactivevideoqa", "EGO/anno.json",
         lambda d: d[0]["answer"][1].update(reply_timespan=[float("nan"), 24]),
         "entry 0, answer[1]: reply_timespan: must be two seconds, it is [nan, 24]"),
        ("ovobench", "ovo_bench_new.json", lambda d: d[0].update(gt=float("inf")),
         "entry 0: gt: must be a number, it is inf"),
        ("ovobench", "ovo_bench_new.json", lambda d: d[18].update(test_info=[]),
         "entry 18: test_info: is empty"),
        ("omnimmi", "multiturn_dependency_reasoning.json", lambda d: d[0].update(qa=[]),
         "entry 0: qa: is empty"),
        ("streamingbench", "questions_sqa.json", lambda d: d[0][0].update(questions=[]),
         "entry 0, 0: questions: is empty"),
        ("events", "events.json", lambda d: d[0]["events"][0].update(says=["?"]),
         "entry 0: events: says: has a text without words"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(
    name: str, file: str, change: Change, said: str, tmp_path: Path
) -> None:
    assert said in broken(tmp_path, name, file, change)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("ovobench", "expected NAME=PATH, NAME one of ovobench, streamingbench,"),
        ("mmlu=x.json", "expected NAME=PATH"),
        ("events=gone.json", "gone.json: cannot be read"),
        ("omnimmi=gone.json", "its name says what it holds"),
        ("omnimmi=.", "has none of action_prediction.json,"),
    ],
)
def test_a_benchmark_that_is_not_there_is_named(
    named: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormError, match=said):
        select(StreamingConfig(benchmarks=(named,)))


def test_a_line_ends_where_json_lines_end(tmp_path: Path) -> None:
    """Texts have other ends of lines; editors write a byte order mark."""
    events = [{"second": 1, "says": ["a"]}]
    entries = [{"video": "a.mp4", "question": f"Tell\u2028me\x85 {n}", "events": events}
               for n in range(2)]  # fmt: skip
    lines = "\r\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    file = tmp_path / "events.jsonl"
    file.write_bytes(f"\ufeff{lines}\r\n\r\n".encode())
    (selection,) = select(StreamingConfig(benchmarks=(f"events={file}",)))
    assert [item.prompts[0].text for item in selection.items] == [
        "Tell\u2028me\x85 0",
        "Tell\u2028me\x85 1",
    ]
    for text, said in (("{}\n{", "events.jsonl, line 2: is not JSON"), ("[" * 10**5, "line 1: is")):
        file.write_text(text)
        with pytest.raises(FormError, match=said):
            select(StreamingConfig(benchmarks=(f"events={file}",)))


def test_what_would_be_kept_in_one_place_is_refused(tmp_path: Path) -> None:
    """What is said of an item is found again by its id, and by its bias."""
    first, second = (WRITERS["events"](tmp_path / name) for name in ("one", "two"))
    config = StreamingConfig(benchmarks=(f"events={first}", f"events={second}"))
    with pytest.raises(FormError, match="an item of another file of events is called 0, too"):
        select(config)
    config = StreamingConfig(benchmarks=(f"events={first}",), biases=[1.0, 2.0, 1.0000001])
    with pytest.raises(FormError, match="biases: 1, 2, 1: one stands there twice"):
        select(config)


def test_nothing_to_ask_is_an_error(tmp_path: Path) -> None:
    none, questions = tmp_path / "none.json", WRITERS["ovobench"](tmp_path)
    none.write_text("[]")
    with pytest.raises(FormError, match=r"none.json: has no questions"):
        select(StreamingConfig(benchmarks=(f"events={none}",)))
    config = StreamingConfig(benchmarks=(f"ovobench={questions}",), tasks=("OCR", "XYZ"))
    (selection,) = select(config)
    assert {item.row for item in selection.items} == {"ovobench OCR"}
    with pytest.raises(FormError, match="tasks XYZ: are part of no row's name: ovobench EPM, ovo"):
        select(replace(config, tasks=("XYZ",)))
    with pytest.raises(FormError, match="biases: need events"):
        select(replace(config, biases=[0.0, 1.0]))


def test_words_of_the_benchmark_are_those_of_its_repository(tmp_path: Path) -> None:
    """The layout of OVO-Bench's repository: data/, and constant.py at its top."""
    (tmp_path / "data").mkdir()
    (tmp_path / "constant.py").write_text(
        'import os\nBR_PROMPT_TEMPLATE = """Q: {}\nO: {} {as it is}"""\n'
        'REC_PROMPT_TEMPLATE = "no place"\nraise RuntimeError("it is not run")\n'
    )
    templates = read_templates(tmp_path / "data" / "ovo_bench_new.json")
    assert templates("ovobench.choice", "Who?", "A. me;") == "Q: Who?\nO: A. me; {as it is}"
    assert templates.found == {"ovobench.choice": f"{tmp_path / 'constant.py'}: BR_PROMPT_TEMPLATE"}
    assert "How often" in templates("ovobench.REC", "How often?")  # theirs does not fit
    own = tmp_path / "own.yaml"
    own.write_text("push.REC: 'Count {}.'\n")
    assert read_templates(own=own)("push.REC", "jumps") == "Count jumps."
    kept = describe_own(own)  # what run.json has of it
    assert kept["texts"] == {"push.REC": "Count {}."}
    assert kept["sha256"] == hashlib.sha256(own.read_bytes()).hexdigest()
    for text, said in (("a: b", "'a': expected texts"), ("push.REC: Count.", "needs 1 times")):
        own.write_text(text)
        with pytest.raises(FormError, match=said):
            read_templates(own=own)


def test_letters_numbers_and_phrases_are_found_in_texts() -> None:
    assert [last_number(t) for t in ("1 of 12", "Three!", "none", "2nd")] == [12, 3, None, None]
    assert contains_phrase("Now: put on the Wig!", "put on the wig")
    assert not contains_phrase("input on the wig", "put on")


# What models answer to questions with options.
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("B", "B"), ("b", "B"), ("(B)", "B"), ("B.", "B"), ("B. A cat", "B"), ("B) a cat", "B"),
        ("The answer is B", "B"), ("Answer: b", "B"), ("The answer is (b).", "B"),
        ("**B**", "B"), ("**Answer:** B", "B"), ("B, because A man walks", "B"), ("答案是B", "B"),
        ("选B。", "B"), ("Ｂ", "B"), ("（Ｂ）", "B"), ("A is right", "A"), ("A", "A"), ("A.", "A"),
        ("(A) red", "A"), ("A: red", "A"), ("I say A", "A"), ("B or C", "B"), ("(b) or C.", "C"),
        ("Option A shows the man", "A"), ("The answer is A the man", "A"), ("Answer: A cat", ""),
        # Articles, names and other words are no options.
        ("A man opens the door, so it is B", "B"), ("A cat", ""), ("A 3D film", ""),
        ("a dog", ""), ("The answer is a dog", ""), ("C-shaped", ""), ("It is in 3D", ""),
        ("I am", ""), ("", ""), ("Bananas", ""), ("option A's", ""), ("As an AI, I cannot.", ""),
    ],
)  # fmt: skip
def test_letters_of_options_are_found_in_answers(text: str, wanted: str) -> None:
    assert letter(text) == wanted


@pytest.mark.parametrize("form", ["{}", "{letter}. {}"])
def test_who_says_an_options_words_names_that_option(form: str) -> None:
    texts = ("a dog", "A cat", "the cat B", "A")
    options = [form.format(t, letter=chr(65 + n)) for n, t in enumerate(texts)]
    said = {"A cat.": "B", "the Cat B": "C", "**A dog**": "A", "A": "A", "D": "D", "B. A cat": "B"}
    assert {text: choice(text, options) for text in said} == said
    assert choice("a cat or a dog", options) == ""


def test_only_an_options_own_letter_is_no_part_of_its_words() -> None:
    assert choice("Vitamin C: good", ["B: good", "Vitamin C: good"]) == "B"
    assert choice("a dog", ["(A) a cat", "(B) a dog"]) == "B"


def test_questions_that_follow_each_other_are_asked_in_the_order_of_their_file(
    tmp_path: Path,
) -> None:
    """As StreamingBench's own loop: in one published list the last question has the first time."""
    path = write_streamingbench(tmp_path) / "questions_sqa.json"
    (entries,) = json.loads(path.read_text())
    path.write_text(json.dumps([[entries[n] for n in (1, 2, 0)]]))  # at 12, 20 and 6
    benchmark = StreamingBench(read_templates(), Timing())
    (item,) = benchmark.read(path, tmp_path)
    asked: list[tuple[float | None, str]] = []

    def ask(start: float, end: float | None, question: str) -> Reply:
        asked.append((end, question))
        return Reply(start, end or 0.0, question, {12.0: "C", 20.0: "B"}.get(end or 0, "D"))

    replies = benchmark.poll(item, ask)
    assert [second for second, _ in asked] == [12, 20, 6]
    assert ["What is there at 20?" in question for _, question in asked] == [False, True, True]
    points = benchmark.official(item, replies, no_judge)
    assert [(p.score, p.at) for p in points] == [(1, 12), (1, 20), (0, 6)]
    # In a stream they come as time goes by.
    said = tuple(Emission(at, text, at, turn) for turn, (at, text) in
                 enumerate([(7.0, "A"), (13.0, "C"), (21.0, "none")], 1))  # fmt: skip
    points = benchmark.push(item, Watched(said, 30.0), no_judge)
    assert [(p.score, p.at) for p in points] == [(1, 12), (0, 20), (1, 6)]
