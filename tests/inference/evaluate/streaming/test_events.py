"""Events that happen while something is said: seen or not, how late, and what became of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.commands import FAILED
from data_pipeline.video import frames_at
from inference.evaluate.results import BenchmarkError
from inference.evaluate.streaming.config import StreamingConfig
from inference.evaluate.streaming.events import HOW, Events
from inference.evaluate.streaming.items import Emission, Item, TimedPrompt, Watched
from inference.evaluate.streaming.operating_curve import OperatingPoint, best, operating_point
from inference.evaluate.streaming.selection import select
from inference.evaluate.streaming.speaker import SpeakerFailed, Watching
from inference.evaluate.streaming.suite import evaluate
from inference.evaluate.streaming.toy import write_toy_events
from tests.inference.evaluate.streaming import policies
from tests.inference.evaluate.streaming.policies import exact_judge
from tests.inference.evaluate.streaming.published import write_events

EVENT = {"second": 4.0, "says": ["the door opens", "door is open"]}
ITEM = Item(
    "0", "events", Path("a.mp4"), (TimedPrompt(0.0, "Tell me."),),
    truth={"events": [EVENT], "interruptions": []},
)  # fmt: skip


def speech(start: float, *pieces: str, turn: int = 1, cut: bool = False) -> Emission:
    """A piece each second."""
    timed = tuple((start + i, piece) for i, piece in enumerate(pieces))
    return Emission(start, "".join(pieces), timed[-1][0], turn, cut, timed)


LONG = ("There is a long", " wall with a wide", " gate and a", " big tree and", " a house")


@pytest.mark.parametrize(
    ("emissions", "how", "first", "end", "false"),
    [
        # Begun in second 2, the event's frame comes in its third second.
        ([speech(2, *LONG[:3], " oh, the door", " opens now")], HOW[0], 1.0, 2.0, 0),
        ([speech(2, *LONG[:3]), speech(5, "The DOOR,", " it is: door is open")], HOW[1], 2, 2, 1),
        ([speech(2, *LONG), speech(7, "The door opens.")], HOW[2], 3.0, 3.0, 1),
        ([speech(2, *LONG)], "", None, None, 1),
        # Said before the event's frame it does not count; too late neither.
        ([speech(2, "The door opens", " and", " so on")], "", None, None, 1),
        ([speech(2, *LONG[:3]), speech(15, "The door opens.")], "", None, None, 2),
    ],
)
def test_an_event_while_speaking(
    emissions: list[Emission], how: str, first: float | None, end: float | None, false: int
) -> None:
    outcome = Events(within=10.0, step=1.0).outcome(ITEM, Watched(tuple(emissions), 30.0))
    (told,) = outcome.events
    assert told.speaking
    assert (told.how, told.delay) == (how, first)
    assert (None if told.end is None else told.end - 4.0) == end
    assert (outcome.false, outcome.matched) == (false, len(emissions) - false)


@pytest.mark.parametrize(
    ("emissions", "delays"),
    [
        ([speech(9, "He jumps.")], [None, 1.0]),
        ([speech(5, "He jumps."), speech(9, "He jumps")], [1.0, 1.0]),
        ([speech(9, "He jumps, he jumps!")], [5.0, 1.0]),
        ([speech(9, "He jumps"), speech(10, "he jumps")], [6.0, 1.0]),
        ([speech(5, "He jumps."), speech(20, "He jumps")], [1.0, None]),
    ],
)
def test_words_tell_one_event(emissions: list[Emission], delays: list[float | None]) -> None:
    """The same thing happens in seconds 4 and 8."""
    events = [{"second": second, "says": ["he jumps"]} for second in (4.0, 8.0)]
    item = replace(ITEM, truth={"events": events, "interruptions": []})
    outcome = Events(within=10.0, step=1.0).outcome(item, Watched(tuple(emissions), 30.0))
    assert [event.delay for event in outcome.events] == delays
    assert outcome.matched == len([e for e in emissions if e.second < 20])


def test_an_event_in_silence_is_counted_apart() -> None:
    emissions = (speech(0, "A wall", " stands"), speech(4, "The door opens."))
    events = Events(within=10.0, step=1.0)
    points = {p.row: p.score for p in events.push(ITEM, Watched(emissions, 30.0), exact_judge)}
    assert points["events: in silence"] == 1
    assert points["events: first right word in silence"] == 0
    assert points["events: words a minute"] == 6 / 0.5
    assert points["events: false alarms a minute"] == 1 / 0.5
    assert "events: while speaking" not in points


def test_an_interruption_is_timed_from_its_own_second() -> None:
    turn = {"second": 6.0, "text": "Colour?", "says": ["blue"]}
    truth = {"events": [], "interruptions": [turn]}
    item = Item(
        "0",
        "events",
        Path("a.mp4"),
        (TimedPrompt(0, "Tell."), TimedPrompt(6, "Colour?")),
        truth=truth,
    )
    emissions = (speech(3, *LONG[:3], cut=True), speech(8, "It is blue.", turn=2))
    events = Events(within=10.0, step=1.0)
    points = {p.row: p.score for p in events.push(item, Watched(emissions, 30.0), exact_judge)}
    # Its last words came with the frame of second 5, those of second 6 come after the question.
    assert points["events: interrupted while speaking"] == 1
    for ended in (speech(3, *LONG[:3]), speech(2, *LONG[:3], cut=True)):
        outcome = events.outcome(item, Watched((ended, emissions[1]), 30.0))
        assert [cut for _, cut, _ in outcome.answers] == [False]
    assert points["events: reaction to an interruption"] == 2
    assert points["events: interruption answered rightly"] == 1


def test_the_toy_world_has_its_own_events(tmp_path: Path) -> None:
    """An oracle that says what the toy world's narration says, when it says it."""
    path = write_toy_events(tmp_path / "toy", 3)
    config = StreamingConfig(benchmarks=(f"events={path}",))
    policy = policies.Policy(
        lambda item: [(e["second"], e["says"][0]) for e in item.truth["events"]],
        lambda item, question, at: "",
    )
    policy.check_pictures = False
    results = evaluate(
        select(config), lambda bias: policy, exact_judge, "oracle", tmp_path / "out", config
    )
    values = {row.row: row.value for row in results.rows}
    assert values["events"] == 1
    assert values["events: first right word"] == values["events: false alarms a minute"] == 0
    count = sum(len(entry["events"]) for entry in json.loads(path.read_text()))
    assert count == 3 * 5  # four events, and what is there at first


def test_the_toy_world_interrupts_what_is_told(tmp_path: Path) -> None:
    """An oracle is asked a second after the last event, and answers a second later."""
    path = write_toy_events(tmp_path / "toy", 3, interruptions=2)
    plain, *cut = json.loads(path.read_text())
    assert "interruptions" not in plain
    turns = {entry["id"]: entry["interruptions"][0] for entry in cut}
    for entry in cut:
        asked = turns[entry["id"]]["second"]
        assert asked == entry["events"][-1]["second"] + 1
        video = (path.parent / entry["video"]).read_bytes()
        # The background is the same every six seconds.
        seconds = [asked - 2.0, asked + 4.0, float(asked), asked + 6.0]
        before, after, then, later = (frame.int() for frame in frames_at(video, seconds))
        assert (then - later).abs().max() < 16 < (before - after).abs().max()
    config = StreamingConfig(benchmarks=(f"events={path}",))
    policy = policies.Policy(
        lambda item: [
            *((e["second"], e["says"][0]) for e in item.truth["events"]),
            *((turn["second"] + 1, f"It is {turn['says'][0]}.")
              for name, turn in turns.items() if name == item.id),
        ],
        lambda item, question, at: "",
    )  # fmt: skip
    policy.check_pictures = False
    out = tmp_path / "out"
    results = evaluate(select(config), lambda bias: policy, exact_judge, "oracle", out, config)
    values = {row.row: row.value for row in results.rows}
    assert values["events"] == values["events: interruption answered rightly"] == 1
    assert values["events: reaction to an interruption"] == 1
    # Other questions in the same file are not answered by what was said about these.
    write_toy_events(tmp_path / "toy", 3, interruptions=1)
    with pytest.raises(BenchmarkError, match="begun with questions"):
        evaluate(select(config), lambda bias: policy, exact_judge, "oracle", out, config)


def test_the_operating_curve_has_a_point_for_each_bias(tmp_path: Path) -> None:
    """-1: always speaking; 0: the oracle; 1: silent."""
    path = write_events(tmp_path / "events")
    config = StreamingConfig(benchmarks=(f"events={path}",), biases=[-1.0, 0.0, 1.0])
    speakers = {-1.0: policies.always(), 0.0: policies.oracle(), 1.0: policies.silent()}
    out = tmp_path / "out"

    def speaker(bias: float | None) -> policies.Policy:
        return speakers[0.0 if bias is None else bias]

    results = evaluate(select(config), speaker, exact_judge, "policies", out, config)
    rows = {row.row: row for row in results.rows}
    assert [rows[f"events, bias {bias}"].value for bias in (-1, 0, 1)] == [0, 1, 0]
    assert rows["events, best bias"].settings["bias"] == 0
    # One of 31 is the answer to the question in between.
    assert rows["events, bias -1"].settings["precision"] == round(1 / 31, 4)
    assert rows["events, bias -1"].settings["false alarms a minute"] == round(30 / (31 / 60), 3)
    assert json.loads((out / "curve.json").read_text())["best_bias"] == 0
    svg = (out / "curve.svg").read_text()
    assert "<svg" in svg
    assert "false alarms a minute" in svg


def test_streams_that_were_not_watched_are_counted_at_each_bias(tmp_path: Path) -> None:
    """Of three videos one is not there; at bias 1 a second one fails, at bias 2 all of them."""
    path = write_toy_events(tmp_path / "toy", 3)
    entries = json.loads(path.read_text())
    told = [len(entry["events"]) for entry in entries]
    gone = path.parent / entries[2]["video"]
    gone.unlink()
    config = StreamingConfig(benchmarks=(f"events={path}",), biases=[0.0, 1.0, 2.0])

    class Failing(policies.Policy):
        def __init__(self, bias: float) -> None:
            super().__init__(lambda item: [], lambda item, question, at: "")
            self.check_pictures, self._bias = False, bias

        @contextmanager
        def watch(self, item: Item) -> Iterator[Watching]:
            if (self._bias, item.id) == (1.0, "1") or self._bias == 2.0:
                raise SpeakerFailed("it broke", fatal=False)
            with super().watch(item) as watching:
                yield watching

    out, warnings = tmp_path / "out", list[str]()
    results = evaluate(
        select(config), lambda bias: Failing(bias or 0.0), exact_judge, "policy", out, config,
        warnings.append,
    )  # fmt: skip
    assert warnings == [f"no media: {gone}"]
    rows = {row.row: row for row in results.rows}
    for bias, count, failed in ((0, sum(told[:2]), 0), (1, told[0], 1), (2, 0, 2)):
        row = rows[f"events, bias {bias}"]
        assert (row.count, row.of, row.failed) == (count, count + failed + 1, failed)
        assert (row.skipped, row.missing) == ({"no media": 1}, 0)
        assert row.value == (0 if count else None)
    assert results.exit_code == FAILED


def test_of_equal_points_the_one_that_speaks_least_is_best() -> None:
    points = [
        OperatingPoint(b, 4, 0.5, 0.5, 0.5, 1.0, words, 1.0) for b, words in ((0, 30.0), (2, 9.0))
    ]
    assert best(points).bias == 2
    with pytest.raises(ValueError, match="no events"):
        operating_point(0.0, [])
