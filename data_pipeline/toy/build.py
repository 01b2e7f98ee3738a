"""Builds the toy data set: shards of text, pictures and videos, and a tokenizer for them.

OUT/train/{text,image,video}/  OUT/heldout/{text,image,video}/  OUT/tokenizer/  OUT/toy.json
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.index import prepare_index
from data_pipeline.progress import Progress
from data_pipeline.schema import IMAGE_MARK, VIDEO_MARK
from data_pipeline.shards import ShardError, check_source, write_shards
from data_pipeline.tokens import build_toy_tokenizer
from data_pipeline.toy import captions, render, world

MODALITIES = ("text", "image", "video")
_VERSION = 1  # of what is drawn and said; a change makes existing folders stale


@dataclass(frozen=True)
class ToyConfig:
    """`train` and `heldout` count samples of each of the three sources; `size` is in pixels."""

    train: int = 512
    heldout: int = 64
    seed: int = 0
    size: int = 64
    fps: int = 8
    min_seconds: int = 4
    max_seconds: int = 6
    samples_per_shard: int = 128
    vocab_size: int = 512

    def __post_init__(self) -> None:
        for name, least in (("train", 1), ("heldout", 1), ("size", 32), ("fps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)}: must be at least {least}")
        if self.size % 2:
            raise ValueError(f"size: {self.size}: must be even, H.264 needs it")


def build_toy(out_dir: str | Path, config: ToyConfig, workers: int = 2) -> dict[str, Any]:
    """Builds what is missing and returns the manifest, which is written last.

    A finished folder with the same arguments is left as it is. One with other arguments is a
    ShardError: it is somebody's data, not ours to delete.
    """
    out = Path(out_dir)
    wanted = {"version": _VERSION, **asdict(config)}
    existing = _finished(out, wanted)
    if existing is not None:
        return existing
    started = time.perf_counter()
    counts = {"train": config.train, "heldout": config.heldout}
    texts: list[str] = []
    sizes: dict[str, Any] = {}
    progress = Progress("toy data", sum(counts.values()) * len(MODALITIES))
    with ProcessPoolExecutor(workers) as pool:
        for split, count in counts.items():
            for modality in MODALITIES:
                folder = out / split / modality
                shutil.rmtree(folder, ignore_errors=True)  # left by a build that was killed
                make = partial(make_sample, modality, split, config)
                samples = pool.map(make, range(count), chunksize=16)
                seen = _watched(samples, progress, texts if split == "train" else None)
                shards = write_shards(seen, folder, config.samples_per_shard)
                prepare_index(folder, workers)
                sizes[f"{split}/{modality}"] = {
                    "samples": count,
                    "shards": len(shards),
                    "bytes": sum(shard.stat().st_size for shard in shards),
                }
    progress.end()
    build_toy_tokenizer(out / "tokenizer", texts, config.vocab_size)
    manifest = {
        "config": wanted,
        "sources": sizes,
        "seconds": round(time.perf_counter() - started, 2),
    }
    partial_file = out / "toy.json.partial"
    partial_file.write_text(json.dumps(manifest, indent=2) + "\n")
    partial_file.replace(out / "toy.json")
    return manifest


def _finished(out: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    file = out / "toy.json"
    if not file.is_file():
        return None
    manifest: dict[str, Any] = json.loads(file.read_text())
    if manifest.get("config") != wanted:
        raise ShardError(
            f"{out} holds a toy set made with other arguments ({manifest.get('config')}): "
            "remove it or choose another folder"
        )
    for source in manifest["sources"]:
        check_source(out / source)
    return manifest


def make_sample(modality: str, split: str, config: ToyConfig, index: int) -> dict[str, Any]:
    """Sample `index` of a source, for write_shards; depends on its arguments alone."""
    # String seeds are hashed by `random` the same way everywhere; the split is part of it, so
    # held-out worlds are other worlds.
    rng = random.Random(f"{config.seed}/{split}/{modality}/{index}")
    seed = rng.getrandbits(48)
    key = f"{modality}-{index:06d}"
    if modality == "text":
        question, answer = captions.ask_text(world.still(seed, config.size), rng)
        return {"__key__": key, "json": _talk(question, answer, "chat", [])}
    if modality == "image":
        things = world.still(seed, config.size)
        talk = ("", captions.describe_still(things))
        if index % 2:
            talk = captions.ask_still(things, rng)
        kind = "chat" if index % 2 else "caption"
        media = [{"type": "image", "file": "0.jpg"}]
        data = _talk(IMAGE_MARK + talk[0], talk[1], kind, media)
        return {"__key__": key, "json": data, "0.jpg": render.jpeg(things, config.size)}
    frames = rng.randint(config.min_seconds, config.max_seconds) * config.fps
    story = world.simulate(seed, config.size, config.fps, frames)
    talk = captions.ask_story(story, rng) if index % 2 else ("", captions.describe_story(story))
    kind = "chat" if index % 2 else "caption"
    data = _talk(VIDEO_MARK + talk[0], talk[1], kind, [{"type": "video", "file": "0.mp4"}])
    return {"__key__": key, "json": data, "0.mp4": render.mp4(story)}


def _talk(question: str, answer: str, kind: str, media: list[dict[str, str]]) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, "media": media, "kind": kind}


def _watched(
    samples: Iterator[dict[str, Any]], progress: Progress, texts: list[str] | None
) -> Iterator[dict[str, Any]]:
    for sample in samples:
        if texts is not None:
            texts += [message["content"] for message in sample["json"]["messages"]]
        progress.step()
        yield sample
