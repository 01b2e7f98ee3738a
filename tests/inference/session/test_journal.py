"""A session that is rebuilt from its journal, at any record, goes on word for word."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inference.engine.engine import Engine
from inference.engine.load import load_engine
from inference.engine.sampling import Sampling
from inference.session.handle import SessionHandle
from inference.session.journal import Journal, Record, fold, sources
from inference.session.rebuilt import rebuild
from inference.session.runner import Runner

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
                journal.taken = number + 1


def said(events: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    return [(e["type"], [e.get(n) for n in NAMES]) for e in events if e["type"] in KEPT]


def configured(runner: Runner, **sampling: Any) -> SessionHandle:
    return runner.session(
        live=False, clock="media", pace=4, max_new_tokens=9,
        sampling=Sampling(silence_bias=4.0, seed=5, **sampling), system_prompt="You see all.",
    )  # fmt: skip


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0, "repetition_penalty": 1.3}], ids=["greedy", "drawn"]
)
def test_it_goes_on_word_for_word_from_every_record(
    runner: Runner, engine: Engine, sampling: dict[str, Any]
) -> None:
    kept: Record = {}
    pictures: dict[int, Tensor] = {}
    states: list[tuple[Record, dict[int, Tensor]]] = []
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
    with configured(runner, **sampling) as session:
        session.keep(journal)
        give(session, journal)
        session.end()
        events = [event.as_dict() for event in session.events()]
    whole = said(events)
    assert len(whole) > 20
    assert states[-1][0]["seq"] == len(events)
    chosen = states[:-1:4]
    assert len(chosen) > 5
    assert any(state["session"]["response"] for state, _ in chosen)
    assert any(state["session"]["frames"] for state, _ in chosen)
    for state, shown in chosen:
        before = [event for event in events if event["seq"] <= state["seq"]]
        text = json.loads(json.dumps(state))
        with rebuild(runner, text, shown) as again:
            give(again, None, state["taken"])
            again.end()
            after = [event.as_dict() for event in again.events(state["seq"])]
        assert after[0]["seq"] == state["seq"] + 1
        assert said(before + after) == whole


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
        session.log.wait_closed(0.2)  # it is silent
        before = session.save()["slot"]
        with session.change():
            found = journal.read()
        assert found is not None
        fold(kept, json.loads(json.dumps(found[0])))
        pictures.update(found[1])
        with rebuild(runner, kept, pictures) as again:
            after = again.save()["slot"]
    assert before["ring"]["count"] == 20
    assert before["slot"]["positions"] != list(range(len(before["slot"]["positions"])))
    del before["slot"]["evictions"], after["slot"]["evictions"]
    for name in ("slot", "ring", "sampling", "window", "sinks"):
        assert after[name] == before[name]
    assert torch.allclose(after["frames"], before["frames"], atol=1e-5)
    assert after["text"].shape == before["text"].shape
