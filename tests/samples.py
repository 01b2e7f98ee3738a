"""Videos whose frames are known, and what an import made of its source."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np


def graded_video(path: Path, stamps: list[float], size: tuple[int, int] = (96, 64)) -> None:
    """Frame i has brightness 8 i and is shown from stamps[i] seconds."""
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, stamp in enumerate(stamps):
            pixels = np.full((size[1], size[0], 3), 8 * i, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(stamp * 1000), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def imported(out: Path) -> dict[str, dict[str, Any]]:
    """Every sample under a folder: its JSON, and its media as bytes under `members`."""
    samples: dict[str, dict[str, Any]] = {}
    for shard in sorted(out.glob("*/*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                sample = samples.setdefault(key, {"members": {}})
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
                if suffix == "json":
                    sample |= json.loads(data)
                else:
                    sample["members"][suffix] = data
    return samples


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    """A tar of members by name."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
