from __future__ import annotations

import itertools
import json
import logging
import os
import pickle
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.energon import WorkerConfig
from megatron.energon.savable_loader import SavableDatasetCheckpoint

from data_pipeline.encode import EncodeConfig
from data_pipeline.index import prepare_index
from data_pipeline.loader.loader import Loader, Source, build_loader
from data_pipeline.loader.mixture import EvenRng
from data_pipeline.shards import ShardError, write_shards
from data_pipeline.toy.build import ToyConfig, make_sample

WEIGHTS = {"text": 30.0, "image": 60.0, "video": 10.0}
Keys = list[tuple[str, ...]]


def encode_config(toy: Path, **changes: Any) -> EncodeConfig:
    values: dict[str, Any] = {
        "tokenizer": str(toy / "tokenizer"), "sequence_length": 512, "tile_size": 28,
        "max_tiles": 1, "video_fps": 1.0, "video_min_frames": 2, "video_max_frames": 4,
        "prompt": "pretrain",
    }  # fmt: skip
    return EncodeConfig(**{**values, **changes})


def open_loader(toy: Path, rank: int, size: int, workers: int, **changes: Any) -> Loader:
    sources = [Source(m, str(toy / "sft/train" / m), m, w) for m, w in WEIGHTS.items()]  # type: ignore[arg-type]
    options: dict[str, Any] = {
        "sources": sources, "encode": encode_config(toy), "micro_batch": 2, "seed": 5,
        "shuffle_buffer": 12, **changes,
    }  # fmt: skip
    return build_loader(
        data_parallel_rank=rank, data_parallel_size=size, workers=workers, **options
    )


def take(loader: Loader, count: int) -> Keys:
    return [tuple(batch.keys) for batch in itertools.islice(loader, count)]


def take_steps(toy: Path, size: int, workers: int, steps: int) -> tuple[list[Keys], list[bytes]]:
    """`steps` steps of all ranks, each taking one batch of each of its streams; then the states.

    Returns one list of keys a stream, and the concatenated states."""
    streams: list[Keys] = []
    states: list[bytes] = []
    for rank in range(size):
        with open_loader(toy, rank, size, workers) as loader:
            keys = take(loader, steps * max(1, workers))
            states += loader.state()
        streams += [keys[k :: max(1, workers)] for k in range(max(1, workers))]
    return streams, states


def test_batches_have_the_promised_shapes(toy: Path) -> None:
    with open_loader(toy, 0, 1, 0) as loader:
        for batch in itertools.islice(loader, 20):
            rows, length = batch.tokens.shape
            assert rows == len(batch.keys) == 2
            assert batch.labels.shape == (rows, length)
            assert batch.frames.shape[1:] == (1, 3, 28, 28)
            assert batch.frames.dtype == torch.uint8
            marks = batch.tokens[batch.frame_rows, batch.frame_positions]
            assert (marks == 512).all()
            assert (batch.tokens == 512).sum() == len(batch.frames)
            assert batch.aspect_ratio_ids.tolist() == [1] * len(batch.frames)
            assert (batch.labels != -100).any(dim=1).all()
            assert batch.skipped == {}


def test_all_layouts_with_as_many_streams_read_the_same(toy: Path) -> None:
    reference, _ = take_steps(toy, 4, 0, 8)
    for size, workers in ((2, 2), (1, 4)):
        assert take_steps(toy, size, workers, 8)[0] == reference
    assert len({tuple(keys) for keys in reference}) == 4


@pytest.fixture(scope="module")
def whole(toy: Path) -> list[Keys]:
    """50 steps of two streams, uninterrupted: more than an epoch of every source but one."""
    return take_steps(toy, 2, 0, 50)[0]


@pytest.mark.parametrize(
    ("before", "after", "steps"),
    [
        ((2, 1), (1, 2), 1),
        ((2, 1), (1, 2), 7),
        ((2, 1), (1, 2), 40),
        ((1, 2), (2, 1), 7),
        ((1, 2), (2, 0), 40),
        ((2, 0), (1, 2), 7),
    ],
)
def test_resuming_in_another_layout_continues_every_stream(
    toy: Path, whole: list[Keys], before: tuple[int, int], after: tuple[int, int], steps: int
) -> None:
    head, states = take_steps(toy, *before, steps)
    assert head == [keys[:steps] for keys in whole]
    size, workers = after
    width = max(1, workers)
    for rank in range(size):
        with open_loader(toy, rank, size, workers) as loader:
            loader.load_state(states[rank * width : (rank + 1) * width])
            mine = whole[rank * width : (rank + 1) * width]
            expected = [keys[steps + i] for i in range(10) for keys in mine]
            assert take(loader, 10 * width) == expected


@pytest.mark.parametrize("taken", [1, 2, 5])
def test_the_turn_of_the_workers_survives(toy: Path, taken: int) -> None:
    with open_loader(toy, 0, 1, 3) as loader:
        whole = take(loader, taken + 12)
    with open_loader(toy, 0, 1, 3) as loader:
        take(loader, taken)
        states = loader.state()
    with open_loader(toy, 0, 1, 3) as loader:
        loader.load_state(states)
        assert loader.state() == states
        assert take(loader, 1) == whole[taken : taken + 1]
        again = loader.state()  # two of the workers have given nothing since they were restored
    with open_loader(toy, 0, 1, 3) as loader:
        loader.load_state(again)
        assert take(loader, 11) == whole[taken + 1 :]


def test_a_worker_that_is_only_starting_keeps_its_place(toy: Path, monkeypatch) -> None:
    """On a busy machine a state may be asked for while a worker has not begun to iterate."""
    with open_loader(toy, 0, 1, 3) as loader:
        take(loader, 7)
        states = loader.state()
    with open_loader(toy, 0, 1, 3) as resumed:
        resumed.load_state(states)
        take(resumed, 1)
        saved = resumed._inner.save_state_rank()
        assert saved is not None
        saved.worker_states[2] = SavableDatasetCheckpoint(state=None, offset=1)  # as energon says
        monkeypatch.setattr(resumed._inner, "save_state_rank", lambda: saved)
        assert resumed.state()[2] == states[2]


def test_a_state_before_the_first_batch_starts_anew(toy: Path) -> None:
    with open_loader(toy, 0, 1, 2) as loader:
        states = loader.state()
        whole = take(loader, 4)
    with open_loader(toy, 0, 1, 2) as loader:
        loader.load_state(states)
        assert take(loader, 4) == whole


def test_one_epoch_shows_every_sample_once(toy: Path) -> None:
    sources = [Source("text", str(toy / "sft/train" / "text"), "text", 1)]
    seen: Counter[str] = Counter()
    for rank in range(2):
        with open_loader(toy, rank, 2, 0, sources=sources, shuffle_buffer=0) as loader:
            seen.update(key for keys in take(loader, 12) for key in keys)
    assert seen == {f"text/text-{i:06d}": 1 for i in range(48)}


def test_the_mixture_is_the_weights(toy: Path) -> None:
    """Over 1,000 samples of four streams; their shuffle buffers hold some of each source back."""
    weights = {"sft/train/text": 14.0, "sft/train/image": 44.0, "sft/heldout/image": 42.0}
    sources = [Source(n, str(toy / n), "image", weight) for n, weight in weights.items()]
    keys = []
    for rank in range(2):
        with open_loader(toy, rank, 2, 2, sources=sources, micro_batch=10) as loader:
            keys += [key.rsplit("/", 1)[0] for batch in take(loader, 50) for key in batch]
    for name, weight in weights.items():
        assert keys.count(name) / 10 == pytest.approx(weight, abs=1.5)


def test_ten_thousand_draws_keep_the_mixture_to_a_thousandth() -> None:
    config = WorkerConfig(rank=0, world_size=1, num_workers=0, seed_offset=3)
    shares = torch.tensor([79.0, 21.0, 0.0, 300.0])
    config.worker_activate(0)
    try:
        even = EvenRng(config)
        drawn = [even.choice_idx(shares) for _ in range(10_000)]
    finally:
        config.worker_deactivate()
    counts = torch.tensor([drawn.count(index) for index in range(4)])
    torch.testing.assert_close(counts / 10_000, shares / 400, rtol=0, atol=1e-3)


def test_seeds_give_other_orders(toy: Path) -> None:
    orders = []
    for seed in (5, 6):
        with open_loader(toy, 0, 1, 0, seed=seed) as loader:
            orders.append(take(loader, 5))
    assert orders[0] != orders[1]


def test_a_source_smaller_than_the_streams_keeps_its_share(toy: Path, tmp_path: Path) -> None:
    few = [make_sample("sft/train/image", ToyConfig(), i) for i in range(2)]
    write_shards(few, tmp_path)
    prepare_index(tmp_path)
    sources = [
        Source("few", str(tmp_path), "image", 50),
        Source("text", str(toy / "sft/train" / "text"), "text", 50),
    ]
    for rank in range(5):
        with open_loader(toy, rank, 5, 0, sources=sources, micro_batch=1) as loader:
            keys = [key for (key,) in take(loader, 40)]
        assert 10 < sum(key.startswith("few/") for key in keys) < 30


def broken_samples() -> list[dict[str, Any]]:
    """Twelve good samples, and one of each kind of damage."""
    config = ToyConfig()
    good = [make_sample("sft/train/image", config, i) for i in range(12)]
    video = make_sample("sft/train/video", config, 0)
    image = make_sample("sft/train/image", config, 50)
    mismatch = json.loads(json.dumps(image["json"]))
    mismatch["messages"][0]["content"] = "no mark"
    return [
        *good,
        {**image, "__key__": "bad-json", "json": b"{"},
        {**image, "__key__": "bad-jpeg", "0.jpg": image["0.jpg"][:200]},
        {**image, "__key__": "bad-mark", "json": mismatch},
        {"__key__": "bad-missing", "json": image["json"]},
        {**video, "__key__": "bad-mp4", "0.mp4": video["0.mp4"][:3000]},
        {**video, "__key__": "bad-empty", "0.mp4": b""},
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_counted_logged_once_and_skipped(
    toy: Path, tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    write_shards(broken_samples(), tmp_path)
    prepare_index(tmp_path)
    sources = [Source("mine", str(tmp_path), "image", 1)]
    skipped: Counter[str] = Counter()
    keys: list[str] = []
    with (
        caplog.at_level(logging.WARNING),
        open_loader(toy, 0, 1, workers, sources=sources, micro_batch=1) as loader,
    ):
        for batch in itertools.islice(loader, 48):
            skipped.update(batch.skipped)
            keys += batch.keys
    assert not any("bad" in key for key in keys)
    assert set(skipped) == {
        "bad_json", "undecodable_image", "mark_media_mismatch", "missing_media",
        "undecodable_video",
    }  # fmt: skip
    assert min(skipped.values()) >= 2  # counted in every epoch
    if workers == 0:
        lines = [record.getMessage() for record in caplog.records]
        assert sorted(line.split()[1] for line in lines) == [
            f"mine/bad-{name}" for name in ("empty", "jpeg", "json", "mark", "missing", "mp4")
        ]
        assert all("shard-000000.tar" in line for line in lines)


def test_a_resumed_run_skips_and_counts_the_same(toy: Path, tmp_path: Path) -> None:
    write_shards(broken_samples(), tmp_path)
    prepare_index(tmp_path)
    sources = [Source("mine", str(tmp_path), "image", 1)]

    def run(states: list[bytes] | None, count: int) -> tuple[list[Any], list[bytes]]:
        with open_loader(toy, 0, 1, 2, sources=sources) as loader:
            if states:
                loader.load_state(states)
            found = [(batch.keys, batch.skipped) for batch in itertools.islice(loader, count)]
            return found, loader.state()

    whole, _ = run(None, 20)
    head, states = run(None, 9)
    tail, _ = run(states, 11)
    assert head + tail == whole


def test_nothing_but_bad_samples_ends_with_a_word(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards([{"__key__": f"s{i}", "json": b"{"} for i in range(10)], tmp_path)
    prepare_index(tmp_path)
    monkeypatch.setattr("data_pipeline.loader.task.MAX_BAD_IN_A_ROW", 30)
    sources = [Source("mine", str(tmp_path), "text", 1)]
    with (
        open_loader(toy, 0, 1, 0, sources=sources) as loader,
        pytest.raises(ValueError, match="30 samples in a row cannot be used"),
    ):
        take(loader, 1)


def test_workers_end_with_the_loader_and_a_dead_one_is_reported(toy: Path) -> None:
    loader = open_loader(toy, 0, 1, 2)
    take(loader, 2)
    workers = loader._inner._iterator._workers
    loader.close()
    assert [worker.is_alive() for worker in workers] == [False, False]

    loader = open_loader(toy, 0, 1, 2)
    take(loader, 2)
    worker = loader._inner._iterator._workers[1]
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    with pytest.raises(RuntimeError, match=r"worker 1 has died with exit code -9|exited unexp"):
        loader.state()
    loader.close()


def test_a_state_of_other_data_or_streams_is_refused(toy: Path) -> None:
    with open_loader(toy, 0, 1, 2) as loader:
        take(loader, 2)
        states = loader.state()
        with pytest.raises(ValueError, match="already been read"):
            loader.load_state(states)
    with open_loader(toy, 0, 1, 2) as loader:
        with pytest.raises(ValueError, match="entry of stream 1 was given to stream 0"):
            loader.load_state(states[::-1])
        with pytest.raises(ValueError, match="3 entries, but this rank has 2 streams"):
            loader.load_state([*states, states[0]])
        with pytest.raises(ValueError, match="cannot be read"):
            loader.load_state([b"junk", b""])
        with pytest.raises(ValueError, match=r"posix\.system|os\.system"):
            loader.load_state([pickle.dumps(os.system)] * 2)
    with open_loader(toy, 0, 2, 2) as loader, pytest.raises(ValueError, match="2 streams"):
        loader.load_state(states)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"micro_batch": 0}, "micro_batch: 0"),
        ({"data_parallel_rank": 2}, "data_parallel_rank: 2"),
        ({"workers": -1}, "workers: -1"),
        ({"sources": []}, "sources: none"),
        ({"sources": [Source("a", "x", "text", -1)]}, "source a: weight"),
        ({"sources": [Source("a", "x", "text", 1)] * 2}, "names must differ"),
        ({"sources": [Source("a", "/nowhere", "text", 1)]}, "/nowhere does not exist"),
    ],
)
def test_a_wrong_argument_is_named(toy: Path, changes: dict[str, Any], said: str) -> None:
    options: dict[str, Any] = {
        "sources": [Source("text", str(toy / "sft/train" / "text"), "text", 1)],
        "encode": encode_config(toy), "micro_batch": 1, "data_parallel_rank": 0,
        "data_parallel_size": 2, "workers": 0, "seed": 0, "shuffle_buffer": 0, **changes,
    }  # fmt: skip
    with pytest.raises((ValueError, ShardError), match=said):
        build_loader(**options)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tile_size": 0}, "tile_size: 0"),
        ({"prompt": "poem"}, "prompt: 'poem'"),
        ({"video_min_frames": 9}, "video_min_frames: 9"),
    ],
)
def test_a_wrong_encoding_is_named(toy: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        encode_config(toy, **changes)
