"""Measures what the loader costs over decoding: samples and frames a second of one core, start,
memory.

The whole loader (index, shuffling, mixing, labels, batches) is measured against a bare webdataset
pipeline that reads the same shards in order and does the same decoding and resizing: of pictures
with plain PIL, NumPy and torch, of videos with our reader. Both run in this process on one thread
and take turns; the ratio is that of their CPU times. Start: from building a loader over many shards
to its first batch. Memory: what a worker process does not share with others.
"""

from __future__ import annotations

import io
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import torch
import torch.nn.functional as F
import webdataset
from PIL import Image
from torch import Tensor

from data_pipeline.commands import CommandParser
from data_pipeline.encode import EncodeConfig
from data_pipeline.images import fit_size, tile_image
from data_pipeline.index import prepare_index
from data_pipeline.loader.loader import Loader, build_loader
from data_pipeline.loader.order import Part
from data_pipeline.loader.state import Source
from data_pipeline.shards import INDEX_FOLDER, write_shards
from data_pipeline.tokens import build_toy_tokenizer
from data_pipeline.video import open_video, sample_times

TEXT = (
    "A person walks along the shore while two dogs play with a red ball in the shallow water. " * 4
)
TILE, FPS, FEWEST, MOST = 560, 2.0, 8, 64  # as in the first stage


def picture(seed: int) -> bytes:
    """A JPEG of 1280 x 960 with soft structures."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (120, 160, 3), dtype=np.uint8))
    out = io.BytesIO()
    coarse.resize((1280, 960), Image.Resampling.BICUBIC).save(out, "JPEG", quality=88)
    return out.getvalue()


def clip(seed: int, seconds: int = 8, rate: int = 25, grain: int = 0) -> bytes:
    """An H.264 clip of 640 x 360 in which the picture moves; `grain`: noise of a camera, of 255."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (60, 100, 3), dtype=np.uint8))
    scene = np.asarray(coarse.resize((1000, 600), Image.Resampling.BICUBIC))
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream: Any = file.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        stream.options = {"preset": "veryfast"}
        for i in range(seconds * rate):
            left = i % 300
            frame = np.ascontiguousarray(scene[100:460, left : left + 640])
            if grain:
                noise = random.integers(-grain, grain + 1, frame.shape, np.int16)
                frame = np.clip(frame + noise, 0, 255).astype(np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        file.mux(stream.encode())
    return out.getvalue()


def samples(kind: str, count: int) -> Iterator[dict[str, Any]]:
    member = "0.jpg" if kind == "image" else "0.mp4"
    for i in range(count):
        turns = [
            {"role": "user", "content": f"<|{kind}|>"},
            {"role": "assistant", "content": f"{i} {TEXT}"},
        ]
        media = [{"type": kind, "file": member}]
        data = {"messages": turns, "media": media, "kind": "caption"}
        made = picture(i) if kind == "image" else clip(i)
        yield {"__key__": f"{kind}-{i:05d}", "json": data, member: made}


def bare(folder: Path) -> Iterator[int]:
    """Yields the frames of each sample: read, decoded and resized into tiles, nothing else."""
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        json.loads(sample["json"])
        if "0.jpg" in sample:
            tiles = [plain_tile(sample["0.jpg"])]
        else:
            with open_video(sample["0.mp4"]) as video:
                times = sample_times(video.info, FPS, FEWEST, MOST)
                tiles = [tile_image(frame, TILE, 1)[0] for frame in video.frames(times)]
        yield len(torch.stack(tiles))


def plain_tile(data: bytes) -> Tensor:
    """A picture as the loader makes it, [3, TILE, TILE], equal to the bit."""
    with Image.open(io.BytesIO(data)) as opened:
        pixels = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)
    size = fit_size(pixels.shape[1], pixels.shape[2], (1, 1), TILE)
    pixels = F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]
    return F.pad(pixels, (0, TILE - size[1], 0, TILE - size[0]))


def open_loader(folder: Path, tokenizer: Path, workers: int = 0) -> Loader:
    encode = EncodeConfig(
        tokenizer=str(tokenizer), sequence_length=4096, tile_size=TILE, max_tiles=1,
        video_fps=FPS, video_min_frames=FEWEST, video_max_frames=MOST, prompt="pretrain",
    )  # fmt: skip
    return build_loader(
        [Source("bench", str(folder), "image", 1.0)], encode,
        Part(global_batch=1, micro_batch=1, rank=0, size=1),
        workers=workers, seed=1, shuffle_window=10_000,
    )  # fmt: skip


def compare(kind: str, folder: Path, tokenizer: Path, count: int, rounds: int) -> None:
    """Whole epochs of each in turns, so that both see each sample equally often.

    Other jobs on the machine only ever slow a round down: the best rounds say most.
    """
    names = ("loader", "bare")
    cost: dict[str, list[float]] = {name: [] for name in names}
    frames = 0
    with open_loader(folder, tokenizer) as loader:
        batches = iter(loader)
        next(batches)
        for number in range(rounds):
            for name in names if number % 2 else names[::-1]:
                began = time.process_time()
                if name == "bare":
                    frames = sum(bare(folder))
                else:
                    frames = sum(len(b.frames) for b in itertools.islice(batches, count))
                cost[name].append(time.process_time() - began)
    ratios = [theirs / ours for theirs, ours in zip(cost["bare"], cost["loader"], strict=True)]
    for name in names:
        seconds = min(cost[name])
        print(
            f"{kind:6} {name:7} {count / seconds:7.1f} samples/s {frames / seconds:7.1f} frames/s"
        )
    best = min(cost["bare"]) / min(cost["loader"])
    print(
        f"{kind:6} loader / bare: best rounds {best:.3f}, rounds {statistics.median(ratios):.3f}",
        end="",
    )
    print(f" ({min(ratios):.3f}-{max(ratios):.3f})", flush=True)


def many_shards(folder: Path, shards: int) -> None:
    """`shards` names for one real shard, with the index that they would have."""
    write_shards(samples("image", 20), folder)
    prepare_index(folder)
    first = folder / "shard-000000.tar"
    for i in range(1, shards):
        for suffix in (".tar", ".tar.idx"):
            (folder / f"shard-{i:06d}{suffix}").hardlink_to(first.with_suffix(suffix))
    index = folder / INDEX_FOLDER
    info = json.loads((index / ".info.json").read_text())
    info["shard_counts"] = {f"shard-{i:06d}.tar": 20 for i in range(shards)}
    (index / ".info.json").write_text(json.dumps(info))
    split = (index / "split.yaml").read_text()
    (index / "split.yaml").write_text(
        split.replace("- shard-000000.tar", f"- shard-{{000000..{shards - 1:06d}}}.tar")
    )


def start_and_memory(folder: Path, tokenizer: Path, shards: int, workers: int = 2) -> None:
    began = time.perf_counter()
    loader = open_loader(folder, tokenizer, workers)
    built = time.perf_counter()
    with loader:
        batches = iter(loader)
        next(batches)
        first = time.perf_counter()
        print(f"{shards} shards: built in {built - began:.2f} s, first batch {first - built:.2f} s")
        for _ in itertools.islice(batches, 200):
            pass
        children = psutil.Process().children()
        alone = [child.memory_full_info().uss / 1e6 for child in children]
        whole = [child.memory_info().rss / 1e6 for child in children]
    print(f"{shards} shards: a worker has {max(alone):.0f} MB unshared, {max(whole):.0f} MB in all")


def main() -> None:
    parser = CommandParser("python -m tools.bench.data", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--images", type=int, default=100, help="pictures")
    parser.add_argument("--videos", type=int, default=20, help="videos")
    parser.add_argument("--shards", type=int, default=10_000, help="shards for start and memory")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = build_toy_tokenizer(folder / "tokenizer", [TEXT])
        for kind, count in (("image", options.images), ("video", options.videos)):
            write_shards(samples(kind, count), folder / kind)
            prepare_index(folder / kind)
            compare(kind, folder / kind, tokenizer, count, options.rounds)
        for shards in (1, options.shards):
            many_shards(folder / f"many{shards}", shards)
            start_and_memory(folder / f"many{shards}", tokenizer, shards)


if __name__ == "__main__":
    main()
