"""Where frames come from: a video file, a picture, a camera, a stream on the network."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

from torch import Tensor

from data_pipeline import files
from data_pipeline.images import decode_image
from data_pipeline.schema import SampleError
from data_pipeline.stores import without_secrets
from data_pipeline.video import open_video, probe_video, sample_times
from inference.live import LiveSource, SourceError

# Frames that are taken of a whole video by default; a real-time model watches more of them.
CLIP_FPS, CLIP_MIN_FRAMES, CLIP_MAX_FRAMES, WATCHED_MAX_FRAMES = 1.0, 8, 16, 256
RECONNECT = 60.0  # seconds for which a live source that is lost is tried again, by default
_LARGEST = 2 * 2**30  # bytes of a file on the network that is fetched as a whole


class FileSource:
    """A video file: it is read as a whole, and can be watched at any speed.

    Raises SourceError for a file that is not there, or not a whole video.
    """

    live: ClassVar[bool] = False

    def __init__(self, name: str) -> None:
        self.name = without_secrets(name)
        with _explained(name):
            self._data = files.read_bytes(name)
            probe_video(self._data)

    def frames(self, fps: float) -> Iterator[tuple[float, Tensor]]:
        """(second, uint8 [3, H, W]) every 1/fps seconds of the file's clock; SourceError."""
        with _explained(self.name), open_video(self._data) as video:
            times = sample_times(video.info, fps, 1, sys.maxsize)
            yield from zip(times, video.frames(times), strict=True)


def open_source(
    name: str, reconnect: float = RECONNECT, notify: Callable[[str], None] = lambda text: None
) -> FileSource | LiveSource:
    """A video by its name: a path, the number of a camera, a URL, or `-` for stdin.

    What is live is connected to, so that a wrong name is known before a model is loaded for it.

    Args:
        reconnect: seconds for which it is tried again once it is lost; 0: it is not.
        notify: takes a line for the person who waits.

    Raises:
        SourceError: it is not there.
    """
    name = re.sub(r"^[A-Za-z0-9+.-]+://", lambda scheme: scheme[0].lower(), name)
    if name.startswith("file:"):
        name = unquote(urlsplit(name).path)
    path = Path(name)
    camera = re.fullmatch(r"(?:/dev/video)?(\d+)", name)
    piped = name == "-" or name.startswith("pipe:") or path.is_fifo()
    if camera or piped or files.is_url(name):
        device = camera[1] if camera else ""
        live = LiveSource("pipe:0" if name == "-" else name, device, piped, reconnect)
        live.connect(notify)
        if not live.whole or live.file_size > _LARGEST:
            return live
        live.close()
        size = f" of {live.file_size / 2**20:.1f} MiB" if live.file_size else ""
        notify(f"{live.name}: a file{size}, fetched first")
    return FileSource(name)


def picture(path: str) -> Tensor:
    """A picture file, uint8 [3, H, W]; SourceError."""
    with _explained(path):
        return decode_image(Path(path).read_bytes())


def clip(path: str, fps: float, least: int, most: int) -> list[Tensor]:
    """Frames of a whole video at `fps`, from `least` to `most` of them; SourceError."""
    with _explained(path):
        return clip_frames(Path(path).read_bytes(), fps, least, most)


def clip_frames(data: bytes, fps: float, least: int, most: int) -> list[Tensor]:
    """As `clip`, for a video file's bytes; SampleError."""
    with open_video(data) as video:
        return list(video.frames(sample_times(video.info, fps, least, most)))


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns what a file can raise into SourceError."""
    if not files.is_url(name) and not Path(name).is_file():
        folder = Path(name).is_dir()
        raise SourceError(f"{name}: {'is a folder' if folder else 'there is no such file'}")
    public_name = without_secrets(name)
    try:
        yield
    except SampleError as error:
        raise SourceError(f"{public_name}: {error.reason}: {error.detail}") from None
    except OSError as error:
        raise SourceError(f"{public_name}: cannot be read: {error}") from None
