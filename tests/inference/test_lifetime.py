"""Models and sessions that nobody closes, as in a notebook; exits and copies of their process."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import inference
from inference.engine.engine import EngineFull
from tests.torchrun import REPO
from tests.waiting import PATIENCE, until

PICTURE = np.zeros((40, 60, 3), np.uint8)
SHORT: dict[str, Any] = {"live": False, "max_new_tokens": 3}


def load(tiny: Path) -> inference.Model:
    return inference.load(tiny, device="cpu", window=4, max_tokens=256)


def test_a_model_that_nobody_refers_to_any_more_frees_its_memory(tiny: Path) -> None:
    model = load(tiny)
    assert model.chat("Who?", max_new_tokens=2) is not None
    engine, thread = weakref.ref(model.runner.engine), model.runner._thread
    model = load(tiny)  # as a cell that is run again
    thread.join(PATIENCE)
    assert not thread.is_alive()
    until(lambda: gc.collect() is not None and engine() is None)
    assert model.chat("Who?", max_new_tokens=2) is not None
    model.close()


def test_a_session_keeps_its_model_and_its_reader_keeps_it(tiny: Path) -> None:
    session = load(tiny).session(**SHORT)
    gc.collect()
    session.put_frame(PICTURE)
    session.end()
    events, thread = iter(session.events()), session.model.runner._thread  # type: ignore[attr-defined]
    del session
    gc.collect()
    last = list(events)[-1]
    assert (last.type, last.data["reason"]) == ("session.closed", "the input has ended")
    del events
    gc.collect()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_a_session_that_nobody_refers_to_any_more_gives_its_place_back(tiny: Path) -> None:
    with load(tiny) as model:
        held = model.session(**SHORT)
        with pytest.raises(EngineFull, match="close one, or load the model with a larger max_sess"):
            model.chat("Who?")
        log = held.log
        del held
        until(lambda: gc.collect() is not None and log.closed)
        assert log.after(0)[-1].data["reason"] == "nobody refers to it any more"
        until(lambda: model.runner.sessions == 0)
        assert model.chat("Who?", max_new_tokens=2) is not None


def test_a_model_may_be_closed_by_what_it_calls(tiny: Path) -> None:
    model = load(tiny)
    model.runner.call(lambda: None).add_done_callback(lambda _: model.close())
    model.runner._thread.join(PATIENCE)
    assert not model.runner._thread.is_alive()
    model = load(tiny)
    session = model.session(sampling=inference.Sampling(silence_bias=-100.0))
    session.prompt("Talk.")
    for event in session.events():
        if event.type == "response.output_text.delta":
            model.close()
    assert event.data["reason"] == "the runner was closed"


SCRIPT = """
import os, sys, threading
import inference

model = inference.load(sys.argv[1], device="cpu", max_sessions=2)
talk = inference.Sampling(silence_bias=-100.0)
session = model.session(sampling=talk, pace=None, max_new_tokens=None)
session.prompt("Talk.")
next(iter(session.events()))
with model.runner.changed:  # as its thread may hold it at any moment
    child = os.fork()
if not child:
    with model, session:
        for use in (lambda: model.chat("Who?"), lambda: list(session.events())):
            try:
                use()
            except RuntimeError as error:
                print(error, flush=True)
    os._exit(0)
print(os.waitpid(child, 0)[1], session.log.closed)


def last():
    held = model.session(sampling=talk)
    threading.main_thread().join()


threading.Thread(target=last).start()  # it forgets its session when no thread is started any more
"""


def test_an_exit_in_the_middle_of_a_step_and_a_copy_of_the_process(tiny: Path) -> None:
    """The exit is not an abort; the copy, which has no engine's thread, is told so at once."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tiny)],
        cwd=REPO, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    *child, parent = done.stdout.splitlines()
    assert len(child) == 2
    assert all("is a copy (fork) of the one that has loaded the model" in line for line in child)
    assert parent == "0 False"
