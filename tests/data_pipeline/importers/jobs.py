"""Imports as processes: what they read, what they leave, and where they are stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image


def make_records(folder: Path, count: int) -> Path:
    """Records of three groups; every tenth names a picture that is not there."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        pixels = rng.integers(0, 255, (90, 160, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    with (folder / "records.jsonl").open("w") as file:
        for i in range(count):
            record: dict[str, Any] = {"messages": [
                {"role": "user", "content": "<|image|>?" if i % 3 else "?"},
                {"role": "assistant", "content": f"Answer {i}"},
            ]}  # fmt: skip
            if i % 3:
                name = "gone" if i % 10 == 5 else "ab"[i % 2]
                if i in (400, 800):
                    name = f"own{i}"
                    shutil.copy(folder / "a.png", folder / f"{name}.png")
                record["images"] = [f"{name}.png"]
            file.write(json.dumps(record) + "\n")
    return folder / "records.jsonl"


def contents(out: Path) -> dict[str, str]:
    """What an import left, without what energon adds (it draws an id for each index)."""
    files = [*out.glob("*/*.tar"), out / "rejected.jsonl", out / "shards.jsonl"]
    found = {str(p.relative_to(out)): p for p in files}
    return {name: hashlib.md5(path.read_bytes()).hexdigest() for name, path in found.items()}


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "data_pipeline.build", *map(str, arguments)]


@contextmanager
def blocked(medium: Path) -> Iterator[None]:
    """An import comes to the record of this picture or clip and no further: it never ends."""
    aside = medium.with_name(f".{medium.name}")
    medium.rename(aside)
    os.mkfifo(medium)
    try:
        yield
    finally:
        aside.rename(medium)  # whole at once, and also where a test fails: others need it


def has_shards(out: Path, count: int) -> bool:
    return len(list(out.glob("*/*.tar"))) >= count


def has_ended(group: int) -> bool:
    """Whether a process group has no processes but those that nobody has buried yet."""

    def running(process: psutil.Process) -> bool:
        try:
            return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
        except (ProcessLookupError, psutil.NoSuchProcess):
            return False

    return not any(running(process) for process in psutil.process_iter())
