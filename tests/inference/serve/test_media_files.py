"""Pictures and videos that chat requests name by their paths: only below the opened folders."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from data_pipeline.schema import SampleError
from inference.engine.load import load_engine
from inference.serve import media
from inference.serve.decoding import FrameChoice, Task, frames_of, work
from inference.serve.limits import Limits, Refused
from inference.serve.media_files import MediaFolders
from tests.data_pipeline.clips import every, number, video
from tests.inference.serve.serving import Running, data_url, jpeg, serving
from tests.waiting import PATIENCE

MEMORY = 200 * 2**20


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a clip of 10 s, a picture and a link to a file outside."""
    root = tmp_path_factory.mktemp("media")
    folder = root / "opened"
    folder.mkdir()
    video(folder / "clip a.mp4", every(0.5, 20))
    (folder / "i.jpg").write_bytes(jpeg(5))
    (folder / "empty.mp4").touch()
    os.mkfifo(folder / "pipe.mp4")
    (root / "secret.jpg").write_bytes(jpeg(6))
    (folder / "out.jpg").symlink_to(root / "secret.jpg")
    (folder / "in.jpg").symlink_to(folder / "i.jpg")
    return folder


def task(path: Path, kind: Any = "video", **more: Any) -> Task:
    return Task(kind, path, "f", 64, 10**6, 10**6, 60.0, 100, 100, **more)


def test_only_files_below_the_folders_are_found(opened: Path) -> None:
    folders = MediaFolders([opened])
    url = f"file://{opened}"
    assert folders.address(f"{url}/clip%20a.mp4", "f") == opened / "clip a.mp4"
    assert folders.address(f"FILE://localhost{opened}/in.jpg", "f") == opened / "i.jpg"
    assert folders.address("data:,x", "f") == "data:,x"
    wrong = [
        f"{url}/out.jpg", f"{url}/../secret.jpg", f"{url}/none.jpg", f"file://host{opened}/i.jpg",
        "file:///etc/passwd", "file:i.jpg", f"{url}/%00", f"{url}/%ff", "file://[/x",
        f"file://{opened}-more/i.jpg",
    ]  # fmt: skip
    for one in wrong:
        with pytest.raises(Refused, match="there is no such file below the server's --allow_media"):
            folders.address(one, "f")
    for closed in ("https://host/a.png", "/etc/passwd"):
        with pytest.raises(Refused, match="only data: URLs are taken"):
            folders.address(closed, "f")
    with pytest.raises(Refused, match="only data: URLs are taken"):
        MediaFolders().address(f"{url}/i.jpg", "f")
    with pytest.raises(ValueError, match=r"--allow_media .*none: is not a folder"):
        MediaFolders([opened / "none"])


def test_frames_are_those_of_their_seconds(opened: Path) -> None:
    shown = frames_of(task(opened / "clip a.mp4", frames=FrameChoice(fps=1.0, max_frames=100)))
    assert [number(frame.permute(1, 2, 0)) for frame in shown] == list(range(0, 20, 2))
    (picture,) = frames_of(task(opened / "i.jpg", "image"))
    assert picture.shape == (3, 64, 64)


def test_what_cannot_be_read_is_named(opened: Path) -> None:
    for name in ("empty.mp4", "pipe.mp4"):
        with pytest.raises(SampleError, match=f"{name}: is not a file with contents"):
            list(frames_of(task(opened / name)))
    with pytest.raises(SampleError, match=r"gone\.mp4: No such file"):
        list(frames_of(task(opened / "gone.mp4")))
    with pytest.raises(Refused, match="bytes are more than 10"):
        list(frames_of(Task("image", opened / "i.jpg", "f", 64, 10, 10**6, 60.0)))


@pytest.fixture(scope="module")
def server(tiny: Path, opened: Path) -> Iterator[Running]:
    engine = load_engine(tiny, device="cpu", window=16, max_tokens=512, max_sessions=2)
    limits = Limits(frames=12, memory=MEMORY, body_bytes=10**5)
    with serving(engine, limits, stage="sft", folders=[opened]) as running:
        yield running


def ask(server: Running, kind: str, url: str) -> httpx.Response:
    content = [{"type": kind, kind: {"url": url}}, {"type": "text", "text": "What?"}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8}
    return server.post(json=body)


def test_the_server_answers_about_a_file_as_about_its_bytes(server: Running, opened: Path) -> None:
    for kind, name, mime in (
        ("video_url", "clip a.mp4", "video/mp4"),
        ("image_url", "i.jpg", "image/jpeg"),
    ):
        path = opened / name
        answers = [
            ask(server, kind, url).json()
            for url in (path.as_uri(), data_url(path.read_bytes(), mime))
        ]
        assert answers[0]["choices"] == answers[1]["choices"]
        assert answers[0]["usage"] == answers[1]["usage"]
    refused = ask(server, "image_url", "file:///etc/passwd")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_url")


def test_a_long_video_takes_no_memory(server: Running, opened: Path) -> None:
    """Its file is larger than the memory that a decoder may take, and than a request."""
    data = (opened / "clip a.mp4").read_bytes()
    path, size = opened / "long.mp4", 2 * MEMORY
    with path.open("wb") as file:
        file.write(data + size.to_bytes(4, "big") + b"free")
        file.truncate(len(data) + size)
    short = ask(server, "video_url", (opened / "clip a.mp4").as_uri())
    assert ask(server, "video_url", path.as_uri()).json()["choices"] == short.json()["choices"]


@pytest.mark.parametrize("name", ["i.jpg", "clip a.mp4"])
def test_a_decoder_whose_server_is_killed_ends_without_a_word(opened: Path, name: str) -> None:
    """With a frame unread, the system says so by an error, not by an end of file."""
    media.prepare()
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, MEMORY, 0), daemon=True)
    process.start()
    theirs.close()
    ours.send(task(opened / name, "image" if name == "i.jpg" else "video"))
    assert ours.poll(PATIENCE)
    ours.close()
    process.join(PATIENCE)
    assert process.exitcode == 0, "1: an error that nobody caught"
