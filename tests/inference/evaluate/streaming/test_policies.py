"""Scores of policies that are known by arithmetic, for each task of each benchmark.

The numbers below follow from published.py: what is asked when, what is true, and when.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from data_pipeline.commands import DONE
from inference.evaluate.results import Results, Row, read_items
from inference.evaluate.streaming.config import StreamingConfig
from inference.evaluate.streaming.scoring import totals
from inference.evaluate.streaming.selection import select
from inference.evaluate.streaming.suite import evaluate
from tests.inference.evaluate.streaming import policies
from tests.inference.evaluate.streaming.policies import Policy, exact_judge
from tests.inference.evaluate.streaming.published import (
    CHOICE_TASKS,
    SECONDS,
    WRITERS,
)

POLICIES: dict[str, Callable[[], Policy]] = {
    "oracle": policies.oracle, "late": policies.late, "silent": policies.silent,
    "always": policies.always,
}  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Benchmark -> NAME=PATH."""
    folder = tmp_path_factory.mktemp("published")
    return {name: f"{name}={write(folder / name)}" for name, write in WRITERS.items()}


def scores(named: str, policy: Policy, out: Path, **options: object) -> Results:
    config = StreamingConfig(benchmarks=(named,), **options)  # type: ignore[arg-type]
    return evaluate(select(config), lambda bias: policy, exact_judge, "policy", out, config)


def values(results: Results) -> dict[str, float]:
    return {row.row: row.value for row in results.rows if row.value is not None}


# Row: oracle, 3 s late, silent, always speaking.
OVOBENCH = {
    **{f"ovobench {task}": (1, 1, 0, 0) for task in CHOICE_TASKS},
    # An answer may begin within 10 s. `A` is right for one of two.
    **{f"ovobench {task} (push)": (1, 1, 0, 1 / 2) for task in CHOICE_TASKS},
    "ovobench REC": (1, 2 / 5, 0, 0),
    "ovobench SSR": (1, 4 / 7, 0, 5 / 7),
    "ovobench CRR": (1, 3 / 4, 0, 2 / 4),
    # Silence is right where the count is still 0, and where the step is not the one that is done.
    "ovobench REC (push)": (1, 2 / 5, 1 / 5, 1 / 5),
    "ovobench SSR (push)": (1, 4 / 7, 2 / 7, 2 / 7),
    "ovobench CRR (push)": (1, 1, 0, 0),
    "ovobench backward": (1, 1, 0, 0),
    "ovobench real-time": (1, 1, 0, 0),
    "ovobench forward": (1, (2 / 5 + 4 / 7 + 3 / 4) / 3, 0, (5 / 7 + 2 / 4) / 3),
    "ovobench": (1, (2 + (2 / 5 + 4 / 7 + 3 / 4) / 3) / 3, 0, (5 / 7 + 2 / 4) / 9),
    "ovobench backward (push)": (1, 1, 0, 1 / 2),
    "ovobench real-time (push)": (1, 1, 0, 1 / 2),
    "ovobench forward (push)": (1, (2 / 5 + 4 / 7 + 1) / 3, 17 / 105, 17 / 105),
    "ovobench (push)": (1, (2 + (2 / 5 + 4 / 7 + 1) / 3) / 3, 17 / 315, (1 + 17 / 105) / 3),
}
STREAMINGBENCH = {
    "streamingbench real: Counting": (1, 1, 0, 0),
    "streamingbench real: Counting (push)": (1, 1, 0, 1 / 2),
    "streamingbench real": (1, 1, 0, 0),
    "streamingbench real (push)": (1, 1, 0, 1 / 2),
    "streamingbench omni: Scene Understanding": (1, 1, 0, 0),
    "streamingbench omni: Scene Understanding (push)": (1, 1, 0, 0),
    "streamingbench omni": (1, 1, 0, 0),
    "streamingbench omni (push)": (1, 1, 0, 0),
    "streamingbench sqa": (1, 1, 0, 0),
    "streamingbench sqa (push)": (1, 1, 0, 1 / 3),
    # 3 s are more than the 2 that are allowed; who speaks at 20 or 21 is in time for 21.
    "streamingbench proactive": (1, 0, 0, 0),
    "streamingbench proactive (time)": (1, 0, 0, 1 / 2),
    "streamingbench proactive (push)": (1, 0, 0, 0),
    "streamingbench proactive (time) (push)": (1, 0, 0, 1 / 2),
}
OMNIMMI = {
    **{
        f"omnimmi {row}{end}": (1, 1, 0, 0)
        for row in ("AP", "SI", "SG", "MD", "SG (turns)", "MD (turns)")
        for end in ("", " (push)")
    },
    **{
        f"omnimmi {task} (score){end}": (5, 5, 0, 0)
        for task in ("AP", "SI", "SG", "MD")
        for end in ("", " (push)")
    },
    # Alerts at 10 and 14; at 13 and 17; none; at 1 to 30.
    "omnimmi PA": (1, 1, 0, 0),
    "omnimmi PA (precision)": (1, 1 / 2, 0, 5 / 30),
    "omnimmi PA (IoU)": (1, 1 / 7, 0, 4 / 29),
    "omnimmi PT": (1, 1, 1, 0),
    "omnimmi PT (push)": (1, 1, 1, 0),
}
PROACTIVEVIDEOQA = {
    # 3 of 4 s at 0.5 of 2, one at 2 of 2; with half the delay 1.5 s at 0.5.
    "proactivevideoqa EGO (omega 0)": (1, 3.5 / 8, 1 / 4, 0),
    "proactivevideoqa EGO": (1, 5.75 / 8, 1 / 4, 0),
    "proactivevideoqa EGO (omega 1)": (1, 1, 1 / 4, 0),
}
MINUTES = SECONDS / 60
EVENTS = {
    "events": (1, 1, 0, 0),
    "events: in silence": (1, 1, 0, 0),
    "events: first right word": (0, 3, None, None),
    "events: first right word in silence": (0, 3, None, None),
    "events: end of the answer": (0, 3, None, None),
    "events: interrupted while speaking": (0, 0, 0, 0),
    "events: interruption answered": (1, 1, 0, 1),
    # The one who is always speaking: `A` at 16 at once.
    "events: reaction to an interruption": (0, 3, None, 0),
    "events: interruption answered rightly": (1, 1, None, 0),
    "events: words a minute": (12 / MINUTES, 12 / MINUTES, 0, SECONDS / MINUTES),
    "events: false alarms a minute": (0, 0, 0, (SECONDS - 1) / MINUTES),
}
EXPECTED: dict[str, Mapping[str, tuple[float | None, ...]]] = {
    "ovobench": OVOBENCH, "streamingbench": STREAMINGBENCH, "omnimmi": OMNIMMI,
    "proactivevideoqa": PROACTIVEVIDEOQA, "events": EVENTS,
}  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("benchmark", EXPECTED)
def test_policies_score_what_follows_from_their_rule(
    benchmark: str, policy: str, published: dict[str, str], tmp_path: Path
) -> None:
    results = scores(published[benchmark], POLICIES[policy](), tmp_path)
    place = list(POLICIES).index(policy)
    expected = {row: per[place] for row, per in EXPECTED[benchmark].items()}
    assert values(results) == pytest.approx({k: v for k, v in expected.items() if v is not None})
    assert results.exit_code == DONE
    assert all(row.count == row.of and not row.skipped for row in results.rows)


# Tasks of one choice among these, and the protocols in which they are one.
CHOICES = {
    "letters": ("ovobench", CHOICE_TASKS, "ABCD", "both"),
    "letters of StreamingBench": ("streamingbench", ("real", "omni", "sqa"), "ABCD", "both"),
    "yes or no": ("ovobench", ("SSR", "CRR"), ("Yes", "No"), "official"),
}


def _always(reply: str) -> Policy:
    return Policy(
        lambda item: [(ask.second, reply) for ask in item.prompts], lambda item, question, at: reply
    )


@pytest.mark.parametrize("kind", CHOICES)
def test_a_guess_is_worth_exactly_its_share(
    kind: str, published: dict[str, str], tmp_path: Path
) -> None:
    """Of one item exactly one reply is right. So the scores of all who always give the same reply
    add up to 1, and one who draws replies evenly expects 1 / their number, in each row."""
    benchmark, tasks, replies, protocol = CHOICES[kind]
    sums: Counter[str] = Counter()
    for reply in replies:
        policy = _always(reply)
        out = tmp_path / reply
        options = {"tasks": tasks, "protocol": protocol}
        sums.update(values(scores(published[benchmark], policy, out, **options)))
    assert len(sums) >= len(tasks) * (2 if protocol == "both" else 1)
    assert dict(sums) == pytest.approx(dict.fromkeys(sums, 1.0))


def test_a_later_question_has_the_answer_to_the_earlier_one(
    published: dict[str, str], tmp_path: Path
) -> None:
    policy = policies.oracle()
    scores(published["omnimmi"], policy, tmp_path, tasks=("MD",), protocol="push")
    assert policy.questions == ["What is cooked?", "What comes after eggs?"]
    (item,) = read_items(tmp_path)["omnimmi MD (push)"].values()
    assert item["question"] == "What is cooked?\nWhat comes after ##ANSWER##?"


def test_an_answer_after_the_patience_counts_as_none(
    published: dict[str, str], tmp_path: Path
) -> None:
    options = {"tasks": ("EPM",), "protocol": "push"}
    named = published["ovobench"]
    short = scores(named, policies.late(), tmp_path / "a", patience=2.0, **options)
    enough = scores(named, policies.late(), tmp_path / "b", patience=4.0, **options)
    assert (values(short)["ovobench EPM (push)"], values(enough)["ovobench EPM (push)"]) == (0, 1)


def test_quirks_of_the_official_scorers_are_kept(published: dict[str, str], tmp_path: Path) -> None:
    replies = {
        "ovobench": "I Can't say: A or C, 1 of 1",  # A letter in any word; digits are joined: 11.
        "streamingbench": "The answer is C",  # Only the first character counts.
    }
    found: dict[str, float] = {}
    for name, reply in replies.items():
        policy = Policy(lambda item: [], partial(lambda reply, *asked: reply, reply))
        found |= values(scores(published[name], policy, tmp_path / name, protocol="official"))
    assert found["ovobench EPM"] == 1
    assert found["ovobench REC"] == 0
    assert found["streamingbench real: Counting"] == 0


def test_context_is_what_is_watched_before_a_question(
    published: dict[str, str], tmp_path: Path
) -> None:
    seen: list[float] = []

    class Watcher(Policy):
        def answer(self, item, question, frames, at) -> str:  # type: ignore[no-untyped-def]
            seen.extend(round(frame.float().mean().item() / 8) for frame in frames)
            return "C"

    policy = Watcher(lambda item: [], lambda item, question, at: "")
    options = {"tasks": ("real",), "limit": 1, "protocol": "official"}
    scores(published["streamingbench"], policy, tmp_path / "a", context=3.0, **options)
    assert seen == [3, 4, 5]
    seen.clear()
    scores(published["streamingbench"], policy, tmp_path / "b", max_frames=3, **options)
    assert seen == [0, 2, 5]


def test_a_missing_video_is_counted_and_named(published: dict[str, str], tmp_path: Path) -> None:
    results = scores(
        published["omnimmi"], policies.oracle(), tmp_path, tasks=("PA", "PT"), videos=str(tmp_path)
    )
    rows = {row.row: row for row in results.rows}
    assert rows["omnimmi PA"].skipped == {"no media": 2}
    assert (rows["omnimmi PT (push)"].count, rows["omnimmi PT (push)"].of) == (0, 2)
    assert results.exit_code == DONE
    assert "a.mp4" in (tmp_path / "items" / "omnimmi PA.jsonl").read_text()


@pytest.mark.parametrize("benchmark", ["ovobench", "streamingbench", "proactivevideoqa", "events"])
def test_what_is_not_scored_counts_as_often_as_what_is(
    benchmark: str, published: dict[str, str], tmp_path: Path
) -> None:
    """`of` is the same whether there are videos or not."""
    full = scores(published[benchmark], policies.oracle(), tmp_path / "full")
    none = scores(published[benchmark], policies.oracle(), tmp_path / "none", videos=str(tmp_path))
    assert all(row.of == sum(row.skipped.values()) for row in none.rows)
    whole = {row.row: row.of for row in full.rows}
    assert {row.row: row.of for row in none.rows}.items() <= whole.items()
    assert {row.value for row in none.rows} == {None}


def test_a_total_is_of_all_its_tasks_or_there_is_none(
    published: dict[str, str], tmp_path: Path
) -> None:
    named, oracle = published["ovobench"], policies.oracle()
    few = scores(named, oracle, tmp_path / "few", tasks=("EPM", "OCR", "REC", "SSR"))
    assert not {"ovobench", "ovobench (push)", "ovobench forward"} & set(values(few))
    assert "ovobench REC" in values(few)
    forward = scores(named, oracle, tmp_path / "all", tasks=("REC", "SSR", "CRR"))
    assert values(forward)["ovobench forward"] == 1
    rows = [Row(f"ovobench {task}", "accuracy", 0.5, 1, 1) for task in ("REC", "SSR")]
    rows.append(Row("ovobench CRR", "accuracy", None, 0, 1, skipped={"no media": 1}))
    (group,) = totals(rows, [row.row for row in rows])
    assert (group.row, group.value, group.count, group.of) == ("ovobench forward", None, 2, 3)
    counting = Row("streamingbench real: Counting", "accuracy", 1.0, 3, 3)
    assert totals([counting], [counting.row, "streamingbench real: Text"]) == []


def test_a_score_without_the_judge_that_it_needs_says_so(
    published: dict[str, str], tmp_path: Path
) -> None:
    from inference.evaluate.streaming.judge import no_judge

    config = StreamingConfig(benchmarks=(published["omnimmi"],), tasks=("SI", "PT"))
    config = replace(config, protocol="push")
    policy = policies.oracle()
    results = evaluate(select(config), lambda bias: policy, no_judge, "policy", tmp_path, config)
    rows = {row.row: row for row in results.rows}
    assert rows["omnimmi SI (push)"].skipped == {"no judge": 1}
    assert rows["omnimmi PT (push)"].value == 1
