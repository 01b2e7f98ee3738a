"""Media that are meant to stop the server, and clients that leave: over real sockets."""

from __future__ import annotations

import asyncio
import concurrent.futures
import io
import json
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from inference.engine.engine import Engine
from inference.serve import media
from inference.serve.decoding import Task
from inference.serve.limits import Refused
from tests.inference.serve.attacking import (
    JSON,
    LIMITS,
    USER,
    ask,
    attacked,
    free,
    raw,
    refused,
    reset,
    small_engine,
)
from tests.inference.serve.serving import Client, Running, data_url, jpeg, serving
from tests.waiting import PATIENCE, until


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return small_engine(tiny)


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Running]:
    yield from attacked(engine)


@pytest.fixture(autouse=True)
def _all_free(server: Running) -> Iterator[None]:
    yield
    free(server)


# Media


SDP = (
    b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\n"
    b"m=video 5004 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\n"
)
PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://%s\n#EXT-X-ENDLIST\n"


def clip(*sizes: tuple[int, int]) -> bytes:
    """An AVI of a JPEG of each size, as its header does not say."""
    out = io.BytesIO()
    with av.open(out, "w", format="avi") as container:
        stream: Any = container.add_stream("mjpeg", rate=1)
        stream.width, stream.height = sizes[0]
        stream.pix_fmt = "yuvj420p"
        for number, size in enumerate(sizes):
            packet = av.Packet(jpeg(number, size))
            packet.stream, packet.time_base = stream, Fraction(1)
            packet.pts = packet.dts = number
            packet.is_keyframe = True
            container.mux(packet)
    return out.getvalue()


def test_files_that_name_others_are_not_opened(server: Running, tmp_path: Path) -> None:
    secret = tmp_path / "secret.mp4"
    with av.open(str(secret), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width, stream.height = 64, 64
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for script, words in (
        (SDP, "its format is sdp, taken are mov, "),  # else FFmpeg waits for packets
        (b"ffconcat version 1.0\nfile %s\n", "its format is concat, taken are mov, "),
        (PLAYLIST, "Invalid data found"),
    ):
        data = script.replace(b"%s", str(secret).encode())
        assert words in refused(ask(server, ("video_url", data)), 400, "undecodable_video")
    still = io.BytesIO()
    Image.new("RGB", (64, 64)).save(still, "PNG")
    said = refused(ask(server, ("video_url", still.getvalue())), 400, "undecodable_video")
    assert "its format is png_pipe, taken are mov, mp4, matroska, " in said
    assert ask(server, ("video_url", secret.read_bytes())).status_code == 200


def test_a_video_whose_frames_grow_is_refused_at_the_first_large_one(server: Running) -> None:
    small, large = (320, 240), (4000, 2600)
    assert ask(server, ("video_url", clip(small, small))).status_code == 200
    refused(ask(server, ("video_url", clip(small, large, small))), 400, "undecodable_video")
    refused(ask(server, ("video_url", clip(large))), 400, "too_many_pixels")


def test_photos_and_screenshots_are_taken_by_default(engine: Engine) -> None:
    out = io.BytesIO()
    Image.new("RGB", (4032, 3024), (90, 60, 30)).save(out, "JPEG")
    with serving(engine) as server, server.open() as client:
        assert ask(server, ("image_url", out.getvalue())).status_code == 200
        noise = np.random.default_rng(0).integers(0, 255, (1300, 1300, 3), dtype=np.uint8)
        Image.fromarray(noise).save(large := io.BytesIO(), "PNG")
        assert len(large.getvalue()) > server.hub.limits.frame_bytes  # a session's
        assert ask(server, ("image_url", large.getvalue())).status_code == 200
        client.frame(out.getvalue())
        client.until("input_frame.processed")


def test_clips_leave_the_processor_to_frames_and_steps(server: Running) -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)

    def all_have(pool: media.MediaPool, nice: int) -> bool:
        found = [os.getpriority(os.PRIO_PROCESS, pid) for pid in pool.processes]
        return set(found) == {nice}

    until(lambda: all_have(server.hub.pictures, own))
    until(lambda: all_have(server.hub.clips, min(own + 10, 19)))


def scans(count: int) -> bytes:
    """A progressive JPEG of 8 million pixels that repeats its last scan."""
    out = io.BytesIO()
    Image.new("L", (3264, 2448), 90).save(out, "JPEG", progressive=True)
    data = out.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def held_decoder(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> tuple[threading.Event, threading.Event]:
    """The process for clips is busy with the first one: that it has begun, and that it may go
    on."""
    (worker,), taken, going_on = server.hub.clips._workers, threading.Event(), threading.Event()
    run = worker.run

    def held(*arguments: Any) -> Any:
        taken.set()
        going_on.wait(PATIENCE)
        return run(*arguments)

    monkeypatch.setattr(worker, "run", held)
    return taken, going_on


def test_clips_that_take_long_stop_nobody(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is decoded, one waits, the third is refused at once; a session's frames go on."""
    bomb = scans(6000)
    assert len(bomb) < LIMITS.frame_bytes
    taken, going_on = held_decoder(server, monkeypatch)
    with server.open() as client, concurrent.futures.ThreadPoolExecutor(2) as pool:
        client.until("session.created")
        client.update(silence_bias=50)
        slow = [pool.submit(ask, server, ("image_url", bomb))]
        assert taken.wait(PATIENCE)
        slow.append(pool.submit(ask, server, ("image_url", bomb)))
        until(lambda: server.hub.clips.waiting == 1)
        third = ask(server, ("image_url", bomb))
        refused(third, 503, "overloaded")
        assert third.headers["retry-after"] == "1"
        for second in range(5):
            client.frame(jpeg(1), ts=float(second))
            client.until("input_frame.processed", frame_at=float(second))
        assert not any(answer.done() for answer in slow)
        going_on.set()
        for answer in slow:
            words = refused(answer.result(), 400, "too_slow")
            assert "messages[0].content[0].image_url" in words
        client.send("session.close")
        client.rest()
    assert ask(server, ("image_url", jpeg())).status_code == 200  # on another process


def test_what_all_requests_hold_is_bounded(server: Running) -> None:
    body = b'{"x": "' + b"y" * (11 * 2**20)  # four times of it
    answer = server.post(content=body, headers=JSON)
    assert "memory" in refused(answer, 503, "overloaded")
    assert server.hub.budget.held == 0


# Clients that leave


def post(server: Running, **fields: Any) -> socket.socket:
    body = json.dumps({"messages": [USER], "max_tokens": 400, "ignore_eos": True, **fields})
    head = f"POST /v1/chat/completions HTTP/1.1\nHost: {server.host}\n"
    head += f"Content-Type: application/json\nContent-Length: {len(body)}\n\n"
    return raw(server, head, body.encode())


def test_requests_whose_clients_left_take_no_turn(
    server: Running, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight wait behind two, and all ten go: who comes then is answered at once."""
    step = engine.step

    def slow(steps: Any) -> Any:
        time.sleep(0.05)  # an answer takes 20 s
        return step(steps)

    monkeypatch.setattr(engine, "step", slow)
    sockets = [post(server, stream=number % 2 == 0) for number in range(2)]
    server.wait(2)
    sockets += [post(server) for _ in range(8)]
    until(lambda: server.hub.waiting == 8)
    for one in sockets:
        reset(one)
    until(lambda: server.hub.waiting == 0)
    server.wait(0)  # before any of them could have been answered


def test_media_whose_clients_left_take_no_turn_and_no_memory(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One may wait for the process: who comes after it has left is not refused."""
    taken, going_on = held_decoder(server, monkeypatch)
    picture = {"type": "image_url", "image_url": data_url(jpeg(), "image/jpeg")}
    messages = [{"role": "user", "content": [picture]}]
    first = post(server, messages=messages)
    assert taken.wait(PATIENCE)
    for _ in range(3):
        waiting = post(server, messages=messages)
        until(lambda: server.hub.clips.waiting == 1)
        job = weakref.ref(server.hub.clips._jobs[0])
        reset(waiting)
        until(lambda: server.hub.clips.waiting == 0)
        until(lambda job=job: job() is None)  # type: ignore[misc]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, server, ("image_url", jpeg()))
        until(lambda: server.hub.clips.waiting == 1)
        going_on.set()
        assert answer.result().status_code == 200
    reset(first)


def test_a_client_that_leaves_in_the_prefill_frees_its_place(
    server: Running, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, begun, left = engine.encode, threading.Event(), threading.Event()

    def slow(images: Any) -> Any:
        begun.set()
        left.wait(PATIENCE)
        return encode(images)

    monkeypatch.setattr(engine, "encode", slow)
    parts = [{"type": "image_url", "image_url": data_url(jpeg(), "image/jpeg")}] * 16
    one = post(
        server, messages=[{"role": "user", "content": [*parts, {"type": "text", "text": "x"}]}]
    )
    assert begun.wait(PATIENCE)
    (running,) = server.hub.runner._running
    reset(one)
    until(lambda: running.closing)
    left.set()
    server.wait(0)
    assert running.task.stats.counts["tokens"] <= 1  # of 400


def begin(client: Client) -> dict[str, Any]:
    created = client.until("session.created")
    client.update(source="file", pace=4, silence_bias=2.0, max_output_tokens=9)
    for second in range(4):
        client.frame(jpeg(second), ts=float(second))
        client.until("input_frame.processed", frame_at=float(second))
    return created


def finish(client: Client) -> list[str]:
    """The frames and the question after those of `begin`; what was said to them."""
    client.frame(jpeg(4), ts=4.0, prompt="Who is it?")
    client.frame(jpeg(5), ts=5.0)
    client.send("input_image_buffer.end")
    events = client.rest()
    asked = max(n for n, e in enumerate(events) if e["type"] == "conversation.item.created")
    return [e["text"] for e in events[asked:] if e["type"] == "response.done"]


def test_places_of_sessions_whose_clients_left_go_to_others(server: Running) -> None:
    """And who comes back finds the session as it was, word for word."""
    with server.open() as client:
        begin(client)
        undisturbed = finish(client)
    with server.open() as first:
        created = begin(first)
        last = first.seen[-1]["seq"]
    server.wait_left(created["session"]["id"])
    with server.open() as second, server.open() as third:
        for other in (second, third):  # two places: the first one's is taken
            other.until("session.created")
            other.frame(jpeg())
            other.until("input_frame.processed")
        name = f"?session={created['session']['id']}&last_seq={last}"
        with server.open(name) as early:
            assert early.close_code == 1013  # its session waits, but all are there
        for other in (second, third):
            other.send("session.close")
            other.rest()
    with server.open(name) as again:
        assert finish(again) == undisturbed != []
    assert [e["seq"] for e in again.seen] == list(range(last + 1, last + 1 + len(again.seen)))


def test_processes_that_decode_end_with_the_server(engine: Engine) -> None:
    with serving(engine) as server:
        assert ask(server, ("image_url", jpeg())).status_code == 200
        pools = server.hub.pictures, server.hub.clips
        until(lambda: sum(len(pool.processes) for pool in pools) == 4)
        children = [pid for pool in pools for pid in pool.processes]
    until(lambda: not [pid for pid in children if os.path.exists(f"/proc/{pid}")])


def test_a_server_that_stops_while_its_decoders_start_does_not_wait_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their imports take tens of seconds on a busy machine."""
    imported, starting, started = threading.Event(), threading.Event(), threading.Event()

    def start(worker: media._Worker) -> None:
        starting.set()
        imported.wait(PATIENCE)
        started.set()

    monkeypatch.setattr(media._Worker, "start", start)
    pool = media.MediaPool("decoder", processes=2, waiting=1, seconds=1, memory=2**30)
    assert starting.wait(PATIENCE)

    async def close() -> None:
        asked = asyncio.create_task(pool.frames(task))
        while not pool.waiting:
            await asyncio.sleep(0.01)
        pool.close()
        for late in (asked, pool.frames(task)):  # what waits, and what comes then
            with pytest.raises(Refused, match="the server is shutting down"):
                await late

    task = Task("image", "data:,", "image", 56, 1, 1, 1.0)
    asyncio.run(close())
    assert not started.is_set()
    imported.set()
