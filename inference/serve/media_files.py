"""Pictures and videos that chat requests name as `file:` URLs, below folders that the server's
owner has opened (`--allow_media`)."""

from __future__ import annotations

import mmap
import stat
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from data_pipeline.schema import SampleError
from inference.serve.data_urls import data_name
from inference.serve.limits import Refused


class MediaFolders:
    """Folders whose files clients may name. Without one only `data:` URLs are taken."""

    def __init__(self, folders: Sequence[str | Path] = ()) -> None:
        """Raises ValueError that names what is not a folder."""
        for folder in folders:
            if not Path(folder).is_dir():
                raise ValueError(f"--allow_media {folder}: is not a folder")
        self._folders = [Path(folder).resolve() for folder in folders]

    def address(self, url: object, field: str) -> str | Path:
        """A `data:` URL as it is, or the path of a `file:` URL's file, links in it followed.

        Refused: another URL; a file that is not there, or not below a folder. Which of the two is
        not said, so that nobody learns which files there are elsewhere.
        """
        if not self._folders or not isinstance(url, str) or url[:5].lower() != "file:":
            return data_name(url, field)
        try:
            parts = urlsplit(url)
            path = Path(unquote(parts.path, errors="strict")).resolve(strict=True)
            ours = parts.netloc in ("", "localhost") and parts.path.startswith("/")
            if ours and any(path.is_relative_to(folder) for folder in self._folders):
                return path
        except (OSError, ValueError):  # among them a NUL in the name
            pass
        words = f"{field}: {url!r:.200}: there is no such file below the server's --allow_media"
        raise Refused("invalid_url", words, field)


NO_FOLDERS = MediaFolders()


def read_picture(path: Path, field: str, most: int) -> bytes:
    """The bytes of a picture, at most `most`. Raises Refused, SampleError."""
    size = _size(path, "image")
    if size > most:
        raise Refused("too_large", f"{field}: {size} bytes are more than {most}", field)
    return path.read_bytes()


def map_video(path: Path) -> mmap.mmap:
    """A video's bytes, read as they are needed: a long one takes no memory. SampleError."""
    _size(path, "video")
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _size(path: Path, kind: str) -> int:
    try:
        found = path.stat()
    except OSError as error:
        raise SampleError(f"undecodable_{kind}", f"{path.name}: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode) or not found.st_size:
        raise SampleError(f"undecodable_{kind}", f"{path.name}: is not a file with contents")
    return found.st_size
