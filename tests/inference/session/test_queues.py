"""The published three-queue form, as the published demo script uses it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from inference.engine.load import load_engine
from inference.session.queues import DONE, ERROR, ROUND_END, ROUND_START, SILENCE, QueueModel
from tests.inference.session.test_runner import BIAS, PICTURES
from tests.waiting import PATIENCE


@pytest.fixture(scope="module")
def model(tiny: Path) -> Iterator[QueueModel]:
    made = QueueModel(load_engine(tiny, device="cpu", window=16, max_tokens=512))
    yield made
    made.close()


class Demo:
    """The three queues, and the thread in which the model runs."""

    def __init__(self, model: QueueModel, **options: Any) -> None:
        self.images: queue.Queue[Any] = queue.Queue()
        self.prompts: queue.Queue[str] = queue.Queue()
        self.tokens: queue.Queue[str] = queue.Queue()
        self.error: BaseException | None = None

        def run() -> None:
            try:
                model.real_time_generate(
                    self.images, self.prompts, self.tokens, None, silence_bias=BIAS, **options
                )
            except Exception as error:
                self.error = error

        self.thread = threading.Thread(target=run)
        self.thread.start()

    def read(self, *ends: str) -> list[str]:
        """Tokens up to one of `ends`."""
        found: list[str] = []
        while not found or found[-1] not in ends:
            found.append(self.tokens.get(timeout=PATIENCE))
        return found


def test_frames_and_a_prompt_become_text_silence_and_an_end(model: QueueModel) -> None:
    demo = Demo(model, clock="media", pace=4)
    for picture in PICTURES[:4]:
        demo.images.put(picture)
    heard = demo.read(SILENCE)
    demo.prompts.put("What do you see?")
    heard += demo.read(ROUND_START)
    for picture in PICTURES[4:]:
        demo.images.put(picture)
    demo.images.put(None)
    heard += demo.read(DONE, ERROR)
    demo.thread.join()
    assert heard[-1] == DONE
    assert demo.error is None
    assert heard.count(ROUND_START) == 1
    words = [h for h in heard if h not in (SILENCE, ROUND_START, ROUND_END, DONE)]
    assert words
    assert demo.tokens.empty()


def test_each_decision_to_be_silent_is_put_once(model: QueueModel) -> None:
    demo = Demo(model, clock="media", pace=4, do_sample=False)
    for picture in PICTURES:
        demo.images.put(picture)
    demo.images.put(None)
    heard = demo.read(DONE, ERROR)
    with model._runner.session(live=False, clock="media", pace=4, sampling=_same()) as session:
        for second, picture in enumerate(PICTURES):
            session.put_frame(picture, float(second))
        session.end()
        events = [e.data for e in session.events()]
        task: Any = session._running.task
        silent = [e for e in events if e.get("decision") == "silence"]
        ends = [e for e in events if e.get("reason") == "silence"]
        # A silence that both decides on a frame and ends a response is one silence.
        both = sum(a.get("decision") == b.get("reason") == "silence" for a, b in pairwise(events))
        assert heard.count(SILENCE) == len(silent) + len(ends) - both
        assert task.stats.counts["responses"] > 0


def _same() -> Any:
    from inference.engine.sampling import Sampling

    return Sampling(silence_bias=BIAS)


def test_it_stops_on_request(model: QueueModel) -> None:
    demo = Demo(model, pace=None)
    demo.images.put(PICTURES[0])
    demo.prompts.put("What do you see?")
    demo.read(ROUND_START)
    model.stop_real_time_generate()
    assert demo.read(DONE, ERROR)[-1] == DONE
    demo.thread.join(PATIENCE)
    assert not demo.thread.is_alive()
    model.stop_real_time_generate()  # nothing runs: nothing happens


def test_an_error_is_put_and_raised(model: QueueModel) -> None:
    demo = Demo(model)
    demo.images.put("no picture")
    assert demo.read(DONE, ERROR)[-1] == ERROR
    demo.thread.join()
    assert isinstance(demo.error, FileNotFoundError)


def test_prompts_wait_for_room(model: QueueModel) -> None:
    demo = Demo(model, max_waiting_prompts=1, max_new_tokens=2)
    for _ in range(20):
        demo.prompts.put("What do you see?")
    for _ in range(20):
        demo.read(ROUND_START)
    model.stop_real_time_generate()
    assert demo.read(DONE, ERROR)[-1] == DONE


def test_a_round_ends_at_max_new_tokens(model: QueueModel) -> None:
    demo = Demo(model, max_new_tokens=2, pace=None)
    demo.prompts.put("What do you see?")
    demo.read(ROUND_START)
    for picture in PICTURES:
        demo.images.put(picture)
    demo.images.put(None)
    assert ROUND_END in demo.read(DONE, ERROR)
