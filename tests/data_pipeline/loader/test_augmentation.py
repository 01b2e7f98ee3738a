"""Swapped frames through the whole loader: the same in every layout and after a resume."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.index import prepare_index
from data_pipeline.loader.loader import Loader, build_loader
from data_pipeline.loader.order import Part
from data_pipeline.loader.state import Source
from data_pipeline.shards import write_shards
from data_pipeline.toy.render import mp4
from data_pipeline.toy.world import simulate
from tests.data_pipeline.loader.test_loader import encode_config

SPOTS = 8
Found = tuple[str, tuple[int, ...]]  # a key, and where its frames stand


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve clips of nine seconds with a word before each frame but the first."""
    out = tmp_path_factory.mktemp("talks")
    clip = mp4(simulate(seed=1, seconds=9, events=2), size=56, fps=4)
    content = "<|silence|><|video|>" + "".join(f"word {i}<|video|>" for i in range(SPOTS))
    turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": content}]
    media = [{"type": "video", "file": "0.mp4"}]
    data = {"messages": turns, "media": media, "kind": "realtime"}
    write_shards(({"__key__": f"t{i}", "json": data, "0.mp4": clip} for i in range(12)), out)
    prepare_index(out)
    return out


def open_talks(
    toy: Path,
    talks: Path,
    rank: int,
    size: int,
    workers: int,
    swap: float = 0.5,
    seed: int = 3,
    state: dict[str, Any] | None = None,
) -> Loader:
    config = encode_config(toy, prompt="chat", swap_probability=swap)
    return build_loader(
        [Source("talks", str(talks), "video", 1)], config,
        Part(global_batch=2, micro_batch=1, rank=rank, size=size),
        workers=workers, seed=seed, shuffle_window=4, state=state,
    )  # fmt: skip


def take(loader: Loader, count: int) -> list[Found]:
    batches = itertools.islice(loader, count)
    return [(b.keys[0], tuple(b.frame_positions.tolist())) for b in batches]


def test_frames_land_in_the_same_places_in_every_layout_and_after_a_resume(
    toy: Path, talks: Path
) -> None:
    with open_talks(toy, talks, 0, 1, 2) as loader:
        whole = take(loader, 48)
    ranks = []
    for rank in range(2):
        with open_talks(toy, talks, rank, 2, 0) as loader:
            ranks.append(take(loader, 24))
    assert [found for pair in zip(*ranks, strict=True) for found in pair] == whole

    with open_talks(toy, talks, 0, 1, 2) as loader:
        head = take(loader, 18)
        state = loader.state(9).to_dict()
    with open_talks(toy, talks, 0, 1, 3, state=state) as loader:
        assert head + take(loader, 30) == whole

    with open_talks(toy, talks, 0, 1, 0, swap=0.0) as loader:
        still = take(loader, 1)[0][1]
    moves = [a - b for _, places in whole for a, b in zip(still, places, strict=True)]
    assert set(moves) == {0, 1}
    swaps, spots = sum(moves), SPOTS * len(whole)
    assert abs(swaps - spots / 2) < 5 * (spots / 4) ** 0.5
    by_key = {key: {places for k, places in whole if k == key} for key, _ in whole}
    assert all(len(places) > 1 for places in by_key.values())  # four epochs: other places in each

    with open_talks(toy, talks, 0, 1, 2, seed=4) as loader:
        assert dict(take(loader, 48)) != dict(whole)
