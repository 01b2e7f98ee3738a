"""The page in headless Chromium: a real video file, and a camera that plays one."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import pytest

from inference.cli import CommandError
from inference.engine.load import load_engine
from inference.serve.server import Certificate
from tests.inference.serve.serving import Running, self_signed, serving
from tests.samples import graded_video
from tests.waiting import until

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Running]:
    with serving(
        load_engine(tiny, device="cpu", window=16, max_tokens=512, max_sessions=3)
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
        "--auto-select-tab-capture-source-by-title=MOSS",
    ]  # fmt: skip
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=args)
        yield launched
        launched.close()


@contextlib.contextmanager
def opened(browser: Any, server: Running, **options: Any) -> Iterator[Any]:
    """The page in a browser that knows nothing yet; it must not have complained in the end."""
    context = browser.new_context(**options)
    context.set_default_timeout(90_000)  # on two cores that do other work, too
    made = context.new_page()
    errors: list[Any] = []
    made.on("pageerror", lambda error: errors.append(error))
    made.on("console", lambda message: errors.append(message) if message.type == "error" else None)
    made.goto(server.http)
    yield made
    context.close()
    server.wait(0)
    assert not errors


@pytest.fixture
def page(browser: Any, server: Running) -> Iterator[Any]:
    with opened(browser, server) as made:
        yield made


def set_up(page: Any, **values: str) -> None:
    """Fills in fields of the settings."""
    page.click("#settings")
    for name, value in values.items():
        page.fill(f"#form [name={name}]", value)
    page.click("#form button[value=ok]")


def test_a_file_is_watched_asked_about_and_remembered(
    page: Any, server: Running, tmp_path: Path
) -> None:
    clip = tmp_path / "clip.mp4"
    graded_video(clip, [i / 10 for i in range(29)])  # three seconds
    page.evaluate(SLOWLY)
    set_up(page, prompt="Tell me what you see.", side="64")
    page.set_input_files("#file", clip)
    page.wait_for_selector("#said .speech")
    (live,) = server.hub.sessions.values()
    page.fill("#prompt", "Where is it?")
    page.press("#prompt", "Enter")
    page.wait_for_selector("#said .user:has-text('Where is it?')")
    page.press("#prompt", "Escape")  # hush
    page.wait_for_function("moss.shown.ended")
    page.wait_for_function("document.querySelectorAll('#frames li').length === 3")
    events = live.handle.log.after(0, 10**6)
    frames = [e.data["frame_at"] for e in events if e.type == "input_frame.processed"]
    assert [int(at) for at in frames] == [0, 1, 2]
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
    # What the model saw stands beside what it said: each second's grey, from dark to bright.
    said = page.locator("#frames li").all_text_contents()
    decisions = [e.data["decision"] for e in events if e.type == "input_frame.processed"]
    words = {"speech": "speaks", "silence": "silent"}
    assert said == [f"00:0{s} {words[decision]}" for s, decision in enumerate(decisions)]
    levels = page.evaluate(LEVELS)
    assert levels == sorted(levels)
    assert levels[-1] - levels[0] > 20
    assert page.locator("#said .speech img").first.get_attribute("src") in page.evaluate(
        "moss.shown.frames.map(frame => frame.picture)"
    )
    assert "decision" in page.text_content("#numbers")
    page.click("#stop")
    assert page.get_attribute("#lamp", "data-state") == "off"

    page.reload()
    assert page.locator("#said p").count() == 0
    page.click("#sessions button:has-text('clip.mp4')")
    assert page.locator("#said .user").all_text_contents()[0] == "00:00Tell me what you see."
    with page.expect_download() as download:
        page.click("#save")
    kept = json.loads(download.value.path().read_text())
    assert kept["lines"][0]["kind"] == "user"
    page.click("#forget")
    page.reload()
    assert page.locator("#sessions button").count() == 0


# A video takes its time: a second that ends while the browser stands still has no frame.
SLOWLY = """() => {
  const play = HTMLMediaElement.prototype.play;
  HTMLMediaElement.prototype.play = function () {
    this.playbackRate = 0.25;
    return play.call(this);
  };
}"""
# How bright the pictures of the last frames are.
LEVELS = """Promise.all([...document.querySelectorAll('#frames img')].map(async (img) => {
  await img.decode();
  const canvas = document.createElement('canvas'), context = canvas.getContext('2d');
  context.drawImage(img, 0, 0, 1, 1);
  return context.getImageData(0, 0, 1, 1).data[0];
}))"""


def test_a_camera_is_watched_and_a_lost_connection_found_again(page: Any, server: Running) -> None:
    page.click("#camera")
    page.wait_for_function("moss.shown && moss.shown.bars.length >= 1")
    (live,) = server.hub.sessions.values()
    before = live.detached_at
    for connection in list(server.server.server_state.connections):
        if hasattr(connection, "conn") and live.socket is not None:
            server.between_turns(connection.transport.abort)
    until(lambda: live.detached_at > before)
    shown = page.evaluate("moss.shown.bars.length")
    page.wait_for_function(f"moss.shown.bars.length >= {shown} + 2")
    assert list(server.hub.sessions.values()) == [live]
    seen = page.evaluate("moss.shown.seq")
    page.wait_for_function(f"moss.shown.seq > {seen}")
    times = [e.t_media for e in live.handle.log.after(0) if e.type == "input_frame.processed"]
    assert times == sorted(times)
    page.click("#stop")


def test_several_sessions_are_led_by_the_keyboard_alone(page: Any, server: Running) -> None:
    page.focus("#camera")
    page.keyboard.press("Enter")
    page.wait_for_function("moss.sessions.length === 1 && moss.sessions[0].bars.length >= 1")
    page.focus("#screen")
    page.keyboard.press("Enter")
    page.wait_for_function("moss.sessions.length === 2 && moss.sessions[0].bars.length >= 1")
    assert page.evaluate("moss.shown.name") == "Screen"
    assert len(server.hub.sessions) == 2
    page.keyboard.press("Alt+2")
    assert page.evaluate("moss.shown.name") == "Camera"
    page.focus("#said")
    page.keyboard.press("/")
    page.keyboard.type("What now?")
    page.keyboard.press("Enter")
    page.wait_for_selector("#said .user:has-text('What now?')")
    page.keyboard.press("Alt+1")
    assert page.locator("#said .user").count() == 0  # the other session was not asked
    going_on = page.evaluate("moss.sessions[1].bars.length")
    page.wait_for_function(f"moss.sessions[1].bars.length > {going_on}")  # though it is not shown
    page.wait_for_function("moss.sessions[0].bars.length >= 2")
    # Each control can be reached by Tab, and has a name.
    named = "[...document.querySelectorAll('button, input:not([hidden])')].every(e => e.textContent"
    named += ".trim() || e.ariaLabel || e.labels.length)"
    assert page.evaluate(named)
    for index in ("1", "2"):
        page.keyboard.press(f"Alt+{index}")
        page.click("#stop")


def test_settings_reach_the_session_and_are_kept(page: Any, server: Running) -> None:
    set_up(page, interval="0.5", side="64", silence_bias="3", instructions="Be brief.")
    page.click("#camera")
    page.wait_for_function("moss.shown && moss.shown.bars.length >= 3")
    (live,) = server.hub.sessions.values()
    assert live.handle.config.sampling.silence_bias == 3
    assert live.handle.config.system_prompt == "Be brief."

    def halves() -> list[int]:
        """The half seconds of which there are frames."""
        events = live.handle.log.after(0, 10**6)
        return [int(2 * e.t_media) for e in events if e.type == "input_frame.processed"]

    until(lambda: any(first % 2 == 0 for first, then in pairwise(halves()) if then == first + 1))
    found = halves()
    assert sorted(set(found)) == found  # one of each
    set_up(page, silence_bias="-2")
    until(lambda: live.handle.config.sampling.silence_bias == -2)
    page.click("#stop")
    page.reload()
    page.click("#settings")
    assert page.input_value("#form [name=interval]") == "0.5"
    assert page.input_value("#form [name=instructions]") == "Be brief."
    page.keyboard.press("Escape")


def test_a_phone_sees_the_page_without_scrolling_sideways(browser: Any, server: Running) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with opened(browser, server, **phone) as page:
        page.tap("#camera")
        page.wait_for_function("moss.shown && moss.shown.bars.length >= 1")
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 390
        for name in ("video", "#prompt", "#stop", "#said", "#frames"):
            box = page.locator(name).first.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 390
        for box in (one.bounding_box() for one in page.locator("button:visible").all()):
            assert box["height"] >= 44  # what a finger finds
        page.fill("#prompt", "What now?")
        page.tap("#ask button")
        page.wait_for_selector("#said .user:has-text('What now?')")
        page.tap("#stop")


def test_a_page_over_https_has_a_camera(browser: Any, tiny: Path, tmp_path: Path) -> None:
    chain, key = self_signed(tmp_path)
    certificate = Certificate.of_flags(chain, key)
    engine = load_engine(tiny, device="cpu", window=16, max_tokens=512, max_sessions=1)
    with (
        serving(engine, certificate=certificate) as server,
        opened(browser, server, ignore_https_errors=True) as page,
    ):
        assert page.evaluate("isSecureContext && location.protocol") == "https:"
        page.click("#camera")
        page.wait_for_function("moss.shown && moss.shown.bars.length >= 1")
        page.click("#stop")
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no key")
    for flags, words in (
        ((chain, str(wrong)), "not a certificate and its key without password"),
        ((str(tmp_path / "none.pem"), None), "none.pem: not a certificate"),
        ((None, key), "--ssl_certfile is missing"),
    ):
        with pytest.raises(CommandError, match=words):
            Certificate.of_flags(*flags)
