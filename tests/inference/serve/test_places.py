"""Sessions whose place others take while their clients are away, where that fails: over real
sockets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inference.engine.engine import Engine
from inference.engine.load import load_engine
from tests.inference.serve.serving import Running, jpeg, serving
from tests.inference.serve.test_media import begin, finish


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return load_engine(tiny, device="cpu", window=4, max_tokens=256, max_sessions=2)


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Running]:
    with serving(engine) as running:
        yield running


def test_a_session_whose_context_cannot_be_kept_gives_its_place_all_the_same(
    server: Running, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who needs the place gets it; whose session it was hears why it has ended."""
    kept = list[str]()
    for _ in range(engine.max_sessions):
        with server.open() as client:
            kept.append(begin(client)["session"]["id"])
        server.wait_left(kept[-1])

    def full(_: Any) -> Any:
        raise MemoryError("no memory on the CPU")

    oldest = server.hub.sessions[kept[0]]
    with monkeypatch.context() as patch:
        patch.setattr(engine, "save", full)  # before anybody asks for a place
        with server.open() as other:
            other.until("session.created")
            other.frame(jpeg())
            other.until("input_frame.processed")
            other.send("session.close")
            other.rest()
    assert oldest.end == (1011, "its context could not be kept while its client was away")
    with server.open(f"?session={kept[1]}&last_seq=1") as again:
        assert finish(again)


def test_a_session_that_does_not_get_its_context_back_tells_its_client(
    server: Running, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server.open() as client:
        name = begin(client)["session"]["id"]
    server.wait_left(name)
    live = server.hub.sessions[name]
    others = [server.open() for _ in range(engine.max_sessions)]
    for other in others:
        other.until("session.created")
    assert live.parked
    for other in others:
        other.send("session.close")
        other.rest()

    def full(_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "restore", full)
    with server.open(f"?session={name}&last_seq=1") as again:
        again.until("error", code="engine_error", message="out of memory")
        again.until("session.closed")
        assert again.close_code == 1011
