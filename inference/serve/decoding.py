"""Decodes clients' media: in a process of its own, which `media.py` starts and may kill.

A process answers each Task with messages of one letter and data: `F` a frame, uint8
[3, tile, tile], `L` the last one; `E` why it cannot, as JSON. Nothing that comes back is unpickled:
a decoder that a file has taken over cannot reach further.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import av
import torch
from torch import Tensor

from data_pipeline.images import decode_image
from data_pipeline.schema import SampleError
from data_pipeline.video import VideoInfo, open_video, sample_times
from inference.engine.images import check_header, fit
from inference.serve.data_urls import data_url
from inference.serve.limits import Refused
from inference.serve.media_files import map_video, read_picture
from inference.sources import CLIP_FPS, CLIP_MIN_FRAMES

# What Pillow may take a client's bytes for. It knows 40 more, some of them programs.
PICTURES = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Likewise FFmpeg's. Playlists, scripts and session descriptions, which name other files, are none.
VIDEOS = (
    "mov,mp4,matroska,webm,avi,flv,mpegts,mpeg,mpegvideo,ogg,asf,gif,apng,h264,hevc,m4v,mjpeg,ivf,"
    "obu,dv"
)
_OTHER_FORMAT = re.compile(r"\[([\w,]+)\] Format not on whitelist")  # FFmpeg's words


@dataclass(frozen=True)
class FrameChoice:
    """Which frames of a video are shown; what is None follows the server's defaults."""

    fps: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    num_frames: int | None = None  # exactly so many, spread evenly


@dataclass(frozen=True)
class Task:
    """A medium to decode.

    data: its bytes, a `data:` URL, or the path of its file. field: its place in the request.
    most_bytes, pixels: its limits. left, limit: frames that it may show, and that a request may.
    cpu: seconds of processor time.
    """

    kind: Literal["image", "video"]
    data: bytes | str | Path
    field: str
    tile: int
    most_bytes: int
    pixels: int
    cpu: float
    left: int = 1
    limit: int = 1
    frames: FrameChoice = FrameChoice()


def frames_of(task: Task) -> Iterator[Tensor]:
    """Yields the frames of a medium, uint8 [3, tile, tile] each. Raises Refused, SampleError."""
    data = task.data
    if isinstance(data, str):
        data = data_url(data, task.field, task.most_bytes)
    if task.kind == "image":
        if isinstance(data, Path):
            data = read_picture(data, task.field, task.most_bytes)
        check_header(data, task.pixels, PICTURES)
        yield fit(decode_image(data, PICTURES), task.tile)
        return
    file = map_video(data) if isinstance(data, Path) else data
    with _named_format(), open_video(file, formats=VIDEOS, max_pixels=task.pixels) as video:
        times = _times(task, video.info)
        for frame in video.frames(times):
            yield fit(frame, task.tile)


@contextlib.contextmanager
def _named_format() -> Iterator[None]:
    """Names the format of a file that FFmpeg would read and this server does not."""
    try:
        yield
    except SampleError as error:
        found = _OTHER_FORMAT.search(error.detail)
        if not found:
            raise
        words = f"its format is {found[1]}, taken are {VIDEOS.replace(',', ', ')}"
        raise SampleError(error.reason, words) from None


def _times(task: Task, info: VideoInfo) -> Sequence[float]:
    """The moments of a video that are shown. What a request says about them holds, or is
    refused."""
    chosen, left = task.frames, task.left
    # A rate that is asked for is kept, however few frames that are.
    few = 1 if chosen.fps else min(CLIP_MIN_FRAMES, left)
    most = chosen.num_frames or chosen.max_frames
    least = chosen.num_frames or chosen.min_frames or min(few, most or few)
    most = most or max(least, left + 1 if chosen.fps else left)
    times = sample_times(info, chosen.fps or CLIP_FPS, least, most)
    if len(times) > left:
        rate = f" at {chosen.fps:g} a second" if chosen.fps else ""
        words = f"{task.field}: {info.duration - info.first:.1f} s{rate} are more than {left} "
        words += f"frames, what is left of {task.limit}: lower fps, or give max_frames"
        raise Refused("too_large", words, task.field)
    return times


def work(connection: Connection, memory: int, nice: int) -> None:
    """Answers tasks until the other end of the connection closes.

    memory: bytes that a task may take. nice: added to this process's niceness.
    """
    os.nice(nice)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the server's
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    av.logging.set_level(av.logging.PANIC)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_memory(memory)
    # A server that is killed closes its end; with messages unread there, that is an OSError.
    with contextlib.suppress(EOFError, OSError):
        while True:
            task: Task = connection.recv()
            _limit_cpu(task.cpu)
            connection.send_bytes(_answer(connection, task))


def _answer(connection: Connection, task: Task) -> bytes:
    """Sends all frames of a task but the last; returns the message that ends the task."""
    try:
        frames = frames_of(task)
        last = next(frames)
        for frame in frames:
            connection.send_bytes(b"F" + last.contiguous().numpy().tobytes())
            last = frame
        return b"L" + last.contiguous().numpy().tobytes()
    except Refused as error:
        reason = {"code": error.code, "message": str(error), "field": error.field}
    except SampleError as error:
        reason = {"reason": error.reason, "detail": error.detail}
    except MemoryError:
        reason = {"reason": "too_large", "detail": "decoding takes more memory than is allowed"}
    except Exception as error:  # decoders raise errors of many kinds
        reason = {
            "reason": f"undecodable_{task.kind}",
            "detail": f"{type(error).__name__}: {error}",
        }
    return b"E" + json.dumps(reason).encode()


def _limit_cpu(seconds: float) -> None:
    """Limits the processor time of the next task: the system ends a process that takes more."""
    used = time.process_time()
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used + seconds), resource.RLIM_INFINITY))


def _limit_memory(most: int) -> None:
    """Limits what may be allocated in addition to what is allocated now."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux; other systems count what is only reserved, too
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        most += 1024 * int(lines["VmData"].split()[0])
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))
