"""Messages that a front passes on: as large as a server without a front takes them."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inference.engine.load import load_engine
from inference.replicas.replica import Replica
from inference.serve.access import Access
from inference.serve.limits import Limits
from tests.inference.replicas.fronting import Fronted, fronting
from tests.inference.serve.serving import jpeg
from tests.waiting import PATIENCE, until

FRAME_BYTES = 4000  # a picture as the model sees it has more


@pytest.fixture(scope="module")
def front(tiny: Path) -> Iterator[Fronted]:
    options: dict[str, Any] = {"device": "cpu", "window": 8, "max_tokens": 512, "max_sessions": 1}
    engines = [load_engine(tiny, **options) for _ in range(2)]
    with fronting(engines, Access(), Limits(frame_bytes=FRAME_BYTES)) as running:
        yield running


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (b"x" * 2 * FRAME_BYTES, "too_large"), ("x" * 2 * FRAME_BYTES, "invalid_json"),
        ('"' * 2 * FRAME_BYTES, "invalid_json"), ("\x01" * 2 * FRAME_BYTES, "invalid_json"),
    ],
)  # fmt: skip
def test_the_largest_message_is_an_error_and_ends_nothing(
    front: Fronted, message: str | bytes, code: str
) -> None:
    with front.open() as client:
        client.until("session.created")
        client.socket.send(message)
        assert client.until("error")["code"] == code
        client.send("session.close")
        kinds = {event["type"] for event in client.rest()}
        assert client.close_code == 1000
        assert "session.resumed" not in kinds


@pytest.mark.parametrize("name", ["Accept", "Content-Type", "traceparent", "Cookie"])
def test_headers_of_any_letters_are_no_fault(front: Fronted, name: str) -> None:
    headers = {"Content-Type": "application/json", name: "application/json; x=\xe9"}
    body = json.dumps({"messages": [{"role": "user", "content": "A"}], "max_tokens": 1})
    connection = http.client.HTTPConnection(front.host, timeout=PATIENCE)
    connection.request("POST", "/v1/chat/completions", body, headers)
    assert connection.getresponse().status == 200
    connection.close()


def test_a_session_whose_pictures_are_larger_than_messages_moves(front: Fronted) -> None:
    with front.open() as client:
        name = client.until("session.created")["session"]["id"]
        for second in range(3):
            client.frame(jpeg(second, (32, 24)), ts=float(second))
            client.until("input_frame.processed", frame_at=float(second))
        session = front.front.sessions[name]
        session.task.get_loop().call_soon_threadsafe(session.move, "moved")
        assert client.until("session.resumed")["frames"] == 3
        client.frame(jpeg(3, (32, 24)), ts=3.0)
        client.until("input_frame.processed", frame_at=3.0)
        client.send("session.close")
        client.rest()
        assert client.close_code == 1000


def test_who_takes_a_session_without_input_over_keeps_it(front: Fronted) -> None:
    with front.open() as first:
        name = first.until("session.created")["session"]["id"]
        with front.open(query=f"?session={name}&last_seq=0") as second:
            second.until("session.created")
            assert first.close_code == 4409
            second.frame(jpeg(0, (32, 24)))
            second.until("input_frame.processed")
            second.send("session.close")
            second.until("session.closed", reason="closed by the client")


def test_who_is_told_to_leave_a_replica_as_it_gets_its_seat_there_leaves(
    front: Fronted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else who drains the replica waits for it, and ends it."""
    places, drained = front.front.places, list[Replica]()
    pump = places.pump

    def drain() -> None:
        pump()
        for replica in places.replicas:
            if replica.sessions and not drained:
                drained.append(replica)
                replica.state = "draining"
                for session in list(replica.sessions):
                    session.move("moved")

    monkeypatch.setattr(places, "pump", drain)
    with front.open() as client:
        name = client.until("session.created")["session"]["id"]
        (other,) = (replica for replica in places.replicas if replica not in drained)
        until(lambda: front.front.sessions[name].replica is other)
        client.frame(jpeg(0, (32, 24)))
        client.until("input_frame.processed")
        client.send("session.close")
        client.rest()
    drained[0].state = "ready"


def test_a_replica_of_another_version_is_told(
    front: Fronted, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = front.front.replicas

    def see() -> None:  # at once: the front looks at them, too
        front.front._set_status(first, None, "ok")  # it is there already
        for replica, code in ((first, first.code), (second, "older")):
            with monkeypatch.context() as patched:
                patched.setattr(replica, "state", "starting")
                patched.setattr(replica, "code", code)
                front.front._set_status(replica, None, "ok")

    front.between_turns(see)
    (told,) = [line for line in caplog.messages if "another version" in line]
    assert told.startswith(f"replica 1, {second.address}, runs another version than this front")
