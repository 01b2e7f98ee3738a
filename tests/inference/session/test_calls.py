"""What other threads want of the engine's thread: calls, for which they may give up waiting, and
changes while it waits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch
from torch import Tensor

from inference.engine.images import fit
from inference.engine.load import load_engine
from inference.engine.sampling import Sampling
from inference.session import handle
from inference.session.handle import SessionClosed
from inference.session.runner import Runner
from tests.waiting import PATIENCE, until


@pytest.fixture
def runner(tiny: Path) -> Iterator[Runner]:
    with Runner(load_engine(tiny, device="cpu", window=4, max_tokens=128)) as made:
        yield made


def hold(runner: Runner) -> threading.Event:
    """The engine's thread is busy until the event is set."""
    begun, over = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        over.wait(PATIENCE)

    runner.call(wait)
    assert begun.wait(PATIENCE)
    return over


def test_what_nobody_waits_for_any_more_is_not_called(runner: Runner) -> None:
    called, over = list[int](), hold(runner)
    futures = [runner.call(lambda n=n: called.append(n)) for n in range(3)]  # type: ignore[misc]
    assert futures[1].cancel()
    over.set()
    futures[2].result(PATIENCE)
    assert called == [0, 2]
    assert not runner.failed


def test_the_end_is_told_to_those_who_still_wait(runner: Runner) -> None:
    over = hold(runner)
    futures = [runner.call(lambda: None) for _ in range(3)]
    futures[0].cancel()
    closing = threading.Thread(target=runner.close)
    closing.start()
    until(lambda: runner._stopping)
    over.set()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    assert not runner.failed
    with pytest.raises(CancelledError):
        futures[0].result(PATIENCE)
    for future in futures[1:]:
        assert isinstance(future.exception(PATIENCE), SessionClosed)


def test_another_pace_allows_the_next_words_at_once(runner: Runner) -> None:
    """Not with the next input."""
    talk = Sampling(silence_bias=-100.0)
    with runner.session(sampling=talk, clock="media", pace=2, max_new_tokens=6) as session:
        session.prompt("Talk.")
        session.settle()
        session.configure(pace=None)
        until(lambda: session.log.after(0)[-2].type == "response.done")
        assert session.log.after(0)[-2].data["usage"]["output_tokens"] == 6


@pytest.mark.parametrize("give", ["push_frame", "put_frame"])
def test_others_go_on_while_a_picture_is_scaled(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, give: str
) -> None:
    """Which takes as long as several steps of the engine."""
    counted: list[int] = []

    def scaled(picture: Tensor, tile: int) -> Tensor:
        other = threading.Thread(target=lambda: counted.append(runner.sessions), daemon=True)
        other.start()
        other.join(PATIENCE)
        counted.append(-1)
        return fit(picture, tile)

    monkeypatch.setattr(handle, "fit", scaled)
    with runner.session() as session:
        getattr(session, give)(torch.zeros(3, 40, 60, dtype=torch.uint8))
    assert counted == [1, -1]
