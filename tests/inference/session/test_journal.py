"""A session that is rebuilt from its journal, at any record, goes on word for word."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inference.engine.engine import Engine
from inference.engine.load import load_engine
from inference.engine.sampling import Sampling
from inference.session import rebuilder as rebuilder_module
from inference.session.from_journal import rebuild
from inference.session.handle import SessionHandle
from inference.session.journal import Journal, Record, fold, sources
from inference.session.rebuilder import Rebuilder
from inference.session.runner import Runner
from tests.waiting import PATIENCE, until

FRAMES = 8
KEPT = ("input_frame.processed", "response.done", "response.output_text.delta", "session.state")
NAMES = ("frame_at", "decision", "text", "delta", "status", "reason", "state")


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return load_engine(tiny, device="cpu", window=16, max_tokens=512, max_sessions=3)


@pytest.fixture(scope="module")
def runner(engine: Engine) -> Iterator[Runner]:
    with Runner(engine) as made:
        yield made


def picture(number: int) -> Tensor:
    values = np.random.default_rng(number).integers(0, 255, (3, 56, 56), dtype=np.uint8)
    return torch.from_numpy(values)


def give(
    session: SessionHandle, journal: Journal | None, begin: int = 0, end: int = FRAMES
) -> None:
    """Message n + 1 is frame n; with frame 3 comes a question."""
    for number in range(begin, end):
        asyncio.run(session.room())
        with session.change():
            prompt = "Who is it?" if number == 3 else None
            session.push_frame(picture(number), float(number), prompt, number + 1)
            if journal is not None:
                journal.last_message = number + 1


def said(events: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    return [(e["type"], [e.get(n) for n in NAMES]) for e in events if e["type"] in KEPT]


def configured(runner: Runner, **sampling: Any) -> SessionHandle:
    return runner.session(
        live=False, clock="media", pace=4, max_new_tokens=9,
        sampling=Sampling(silence_bias=4.0, seed=5, **sampling), system_prompt="You see all.",
    )  # fmt: skip


Kept = tuple[Record, dict[int, Tensor]]


def watched(
    runner: Runner, engine: Engine, **sampling: Any
) -> tuple[list[dict[str, Any]], list[Kept]]:
    """The events of a session, and what was known of it after each of its records."""
    kept: Record = {}
    pictures: dict[int, Tensor] = {}
    states: list[Kept] = []
    journal = Journal(engine.window, engine.sinks)

    def read() -> None:
        found = journal.read()
        assert found is not None
        fold(kept, json.loads(json.dumps(found[0])))
        pictures.update(found[1])
        needed = sources(kept)
        for number in [n for n in pictures if n not in needed]:
            del pictures[number]
        states.append((copy.deepcopy(kept), dict(pictures)))

    journal.wake = read
    full = Event()
    with configured(runner, **sampling) as session:
        runner.call(lambda: full.wait(PATIENCE))
        session.keep(journal)
        give(session, journal, end=4)  # as many as may wait
        full.set()
        give(session, journal, begin=4)
        session.end()
        events = [event.as_dict() for event in session.events()]
    return events, states


def rest(again: SessionHandle, kept: Record) -> list[dict[str, Any]]:
    """The events after what is known of it."""
    with again:
        give(again, None, kept["taken"])
        again.end()
        return [event.as_dict() for event in again.events(kept["seq"])]


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0, "repetition_penalty": 1.3}], ids=["greedy", "drawn"]
)
def test_it_goes_on_word_for_word_from_every_record(
    runner: Runner, engine: Engine, sampling: dict[str, Any]
) -> None:
    events, states = watched(runner, engine, **sampling)
    whole = said(events)
    assert len(whole) > 20
    assert states[-1][0]["seq"] == len(events)
    chosen = states[:-1:4]
    assert len(chosen) > 5
    # And in the middle of a response, and with frames that wait.
    for name in ("response", "frames"):
        chosen.append([one for one in states if one[0]["session"][name]][-1])
    rebuilder = Rebuilder(runner)
    for state, shown in chosen:
        before = [event for event in events if event["seq"] <= state["seq"]]
        text = json.loads(json.dumps(state))
        after = rest(rebuild(rebuilder, text, shown), state)
        assert after[0]["seq"] == state["seq"] + 1
        assert said(before + after) == whole


def test_several_are_computed_together_between_the_steps_of_others(
    runner: Runner, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And word for word. A picture that cannot be encoded ends its session alone."""
    events, states = watched(runner, engine)
    state, shown = next(one for one in reversed(states) if len(one[1]) == FRAMES)
    before = [event for event in events if event["seq"] <= state["seq"]]
    monkeypatch.setattr(rebuilder_module, "TURN_FRAMES", 6)
    monkeypatch.setattr(rebuilder_module, "TURN_TOKENS", 40)
    done, broken, stepping = list[str](), picture(99), Event()
    encode, step, run = engine.encode, engine.step, engine.packed.forward

    def encoded(images: Sequence[Tensor]) -> list[Tensor]:
        if any(image is broken for image in images):
            raise ValueError("a picture that cannot be encoded")
        done.append(f"{len(images)} frames")
        return encode(images)

    def stepped(steps: Any) -> Any:
        done.append("step")
        stepping.set()
        try:
            return step(steps)
        finally:
            stepping.clear()

    def ran(parts: Any, attend_all: Any = ()) -> Any:
        if not stepping.is_set():
            done.append("tokens")
            assert sum(len(tokens) for _, tokens, _ in parts) <= 40
        return run(parts, attend_all)

    def hold() -> None:
        held.set()
        both.wait()

    monkeypatch.setattr(engine, "encode", encoded)
    monkeypatch.setattr(engine, "step", stepped)
    monkeypatch.setattr(engine.packed, "forward", ran)
    rebuilder, (first, *_), held, both = Rebuilder(runner), shown, Event(), Event()
    with runner.answer([1, 2], max_new_tokens=10**6, ignore_end=True) as talk:
        next(iter(talk.events()))
        runner.call(hold)
        held.wait()
        with ThreadPoolExecutor(2) as pool:
            given = [json.loads(json.dumps(state)) for _ in range(2)]
            goes, fails = (
                pool.submit(rebuild, rebuilder, kept, pictures)
                for kept, pictures in zip(given, (shown, {**shown, first: broken}), strict=True)
            )
            until(lambda: len(runner._calls) == 2)
            both.set()
        with pytest.raises(ValueError, match="cannot be encoded"):
            fails.result()
    turns = [one for one in done if one != "step"]
    assert turns[:2] == ["6 frames", "2 frames"]
    assert turns[2:] == ["tokens"] * max(2, len(turns[2:]))
    at = [number for number, one in enumerate(done) if one != "step"]
    assert all("step" in done[begin:end] for begin, end in pairwise(at[1:]))
    assert said(before + rest(goes.result(), state)) == said(events)


def test_a_picture_goes_with_the_record_that_names_it(runner: Runner, engine: Engine) -> None:
    """Not with the one before, which is read while a step has the session."""
    journal = Journal(engine.window, engine.sinks)
    with configured(runner) as session:
        session.keep(journal)
        with runner.changed:  # no step begins
            session.running.in_step = True
            give(session, journal, end=1)
            before = session.read_journal()
            session.running.in_step = False
            session.running.write()
            after = session.read_journal()
    assert before is not None
    assert after is not None
    assert (sources(before[0]), set(before[1])) == (set(), set())
    assert (sources(after[0]), set(after[1])) == ({1}, {1})


def test_what_was_dropped_stays_dropped(tiny: Path) -> None:
    """With a ring and a text that overflow: the slot has the same tokens, positions and frames."""
    engine = load_engine(tiny, device="cpu", window=3, sinks=1, max_tokens=96, max_sessions=2)
    kept: Record = {}
    pictures: dict[int, Tensor] = {}
    journal = Journal(engine.window, engine.sinks)
    with Runner(engine) as runner, configured(runner) as session:
        session.keep(journal)
        give(session, journal, end=20)
        for event in session.events():
            if event.type == "input_frame.processed" and event.data["frame_at"] == 19.0:
                break
        session.cancel()
        until(lambda: session.running.task.response is None)
        before = session.save()["slot"]
        with session.change():
            found = journal.read()
        assert found is not None
        fold(kept, json.loads(json.dumps(found[0])))
        pictures.update(found[1])
        with rebuild(Rebuilder(runner), kept, pictures) as again:
            after = again.save()["slot"]
    assert before["ring"]["count"] == 20
    assert before["slot"]["positions"] != list(range(len(before["slot"]["positions"])))
    del before["slot"]["evictions"], after["slot"]["evictions"]
    for name in ("slot", "ring", "sampling", "window", "sinks"):
        assert after[name] == before[name]
    assert torch.allclose(after["frames"], before["frames"], atol=1e-5)
    assert after["text"].shape == before["text"].shape
