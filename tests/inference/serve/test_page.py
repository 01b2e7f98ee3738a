"""The page in headless Chromium: a real video file, and a camera that plays one."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest

from inference.engine.load import load_engine
from tests.inference.serve.serving import Running, serving
from tests.samples import graded_video

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Running]:
    with serving(
        load_engine(tiny, device="cpu", window=16, max_tokens=512, max_sessions=2)
    ) as made:
        yield made


@pytest.fixture(scope="module")
def camera(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Chromium's fake camera plays: raw pictures, twenty a second."""
    path = tmp_path_factory.mktemp("camera") / "camera.y4m"
    with av.open(str(path), "w", format="yuv4mpegpipe") as out:
        stream: Any = out.add_stream("wrapped_avframe", rate=20)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for level in range(60):
            frame = av.VideoFrame(160, 120, "yuv420p")
            for plane in frame.planes:
                plane.update(bytes([level * 4]) * plane.buffer_size)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def browser(camera: Path) -> Iterator[Any]:
    args = [
        "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-video-capture={camera}",
    ]  # fmt: skip
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=args)
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Any, server: Running) -> Iterator[Any]:
    made = browser.new_page()
    errors: list[Any] = []
    made.on("pageerror", lambda error: errors.append(error))
    made.on("console", lambda message: errors.append(message) if message.type == "error" else None)
    made.goto(server.http)
    yield made
    made.close()
    server.wait(0)
    assert not errors


def test_a_file_is_watched_asked_about_and_ends(page: Any, server: Running, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    graded_video(clip, [i / 10 for i in range(29)])  # three seconds
    page.fill("#first", "Tell me what you see.")
    page.set_input_files("#file", clip)
    page.wait_for_function("document.querySelector('#lamp').dataset.state === 'speaking'")
    (live,) = server.hub.sessions.values()
    page.fill("#prompt", "Where is it?")
    page.press("#prompt", "Enter")
    page.wait_for_selector("#said .user:has-text('Where is it?')")
    page.click("#cancel")
    page.wait_for_function("run.ended")
    events = live.handle.log.after(0, 10**6)
    frames = [e.data["frame_at"] for e in events if e.type == "input_frame.processed"]
    assert [round(at) for at in frames] == [0, 1, 2]
    first = next(e for e in events if e.type == "response.created")
    text = "".join(
        e.data["delta"]
        for e in events
        if e.type == "response.output_text.delta"
        and e.data["response_id"] == first.data["response_id"]
    )
    shown = page.locator("#said .speech").first.text_content()
    assert shown.startswith("00:00" + text[:10].rstrip())
    assert page.locator("#said .user").all_text_contents()[0] == "00:00Tell me what you see."
    assert "decision" in page.text_content("#numbers")
    drawn = "Array.from($('strip').getContext('2d').getImageData(0, 0, 40, 64).data).some(v => v)"
    assert page.evaluate(drawn)
    page.click("#stop")
    assert page.get_attribute("#lamp", "data-state") == "off"


def test_a_camera_is_watched_and_a_lost_connection_found_again(page: Any, server: Running) -> None:
    page.click("#camera")
    page.wait_for_function("run && run.bars.length >= 1")
    (live,) = server.hub.sessions.values()
    before = live.detached_at
    for connection in list(server.server.server_state.connections):
        if hasattr(connection, "conn") and live.socket is not None:
            server.server.servers[0].get_loop().call_soon_threadsafe(connection.transport.abort)
    page.wait_for_function("run.bars.length >= 3", timeout=15_000)
    assert list(server.hub.sessions.values()) == [live]
    assert live.detached_at > before
    seen = page.evaluate("run.seq")
    until = time.monotonic() + 5
    while page.evaluate("run.seq") == seen:
        assert time.monotonic() < until
        time.sleep(0.05)
    times = [e.t_media for e in live.handle.log.after(0) if e.type == "input_frame.processed"]
    assert times == sorted(times)
    page.click("#stop")
