from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from data_pipeline.encode import EncodeConfig
from data_pipeline.index import prepare_index
from data_pipeline.loader.loader import Loader, build_loader
from data_pipeline.loader.order import Part
from data_pipeline.loader.state import Source
from data_pipeline.shards import ShardError, write_shards
from data_pipeline.toy.build import ToyConfig, make_sample

WEIGHTS = {"text": 30.0, "image": 60.0, "video": 10.0}
GLOBAL_BATCH = 12
Keys = list[tuple[str, ...]]


def encode_config(toy: Path, **changes: Any) -> EncodeConfig:
    values: dict[str, Any] = {
        "tokenizer": str(toy / "tokenizer"), "sequence_length": 512, "tile_size": 28,
        "max_tiles": 1, "video_fps": 1.0, "video_min_frames": 2, "video_max_frames": 4,
        "prompt": "pretrain",
    }  # fmt: skip
    return EncodeConfig(**{**values, **changes})


def open_loader(
    toy: Path, rank: int = 0, size: int = 1, workers: int = 0, **changes: Any
) -> Loader:
    sources = [Source(m, str(toy / "sft/train" / m), m, w) for m, w in WEIGHTS.items()]  # type: ignore[arg-type]
    options: dict[str, Any] = {
        "sources": sources, "encode": encode_config(toy), "seed": 5, "shuffle_window": 30, **changes
    }  # fmt: skip
    part = Part(GLOBAL_BATCH, options.pop("micro_batch", 1), rank, size)
    return build_loader(part=part, workers=workers, **options)


def take(loader: Loader, count: int) -> Keys:
    return [tuple(batch.keys) for batch in itertools.islice(loader, count)]


def take_after_kill(loader: Loader, number: int) -> Keys:
    """Kills a worker first. That it has gone torch raises in the main thread wherever that is when
    it hears of it: here, if this process stands still meanwhile."""
    worker = loader.processes[number]
    os.kill(worker.pid or 0, signal.SIGKILL)
    worker.join()
    return take(loader, 20)


def take_steps(
    toy: Path, steps: int, size: int = 1, workers: int = 0, micro_batch: int = 1, **changes: Any
) -> tuple[Keys, dict[str, Any]]:
    """Keys of each of the next `steps` steps, of all ranks in a row; then the state."""
    ranks, states = [], []
    for rank in range(size):
        options = changes | {"micro_batch": micro_batch}
        with open_loader(toy, rank, size, workers, **options) as loader:
            each = GLOBAL_BATCH // (micro_batch * size)
            keys = take(loader, steps * each)
            ranks.append([keys[first : first + each] for first in range(0, len(keys), each)])
            states.append(loader.state(steps).to_dict())
    assert all(state == states[0] for state in states)
    found = [
        tuple(key for batch in itertools.chain(*parts) for key in batch)
        for parts in zip(*ranks, strict=True)
    ]
    return found, states[0]


def test_batches_have_the_promised_shapes(toy: Path) -> None:
    with open_loader(toy, micro_batch=2) as loader:
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


@pytest.fixture(scope="module")
def whole(toy: Path) -> Keys:
    """24 steps in one process: several epochs of pictures, less than one of videos."""
    return take_steps(toy, 24)[0]


@pytest.mark.parametrize(
    ("size", "workers", "micro_batch"), [(1, 1, 1), (1, 2, 3), (2, 3, 2), (4, 0, 1), (4, 1, 3)]
)
def test_a_step_has_the_same_samples_in_every_layout(
    toy: Path, whole: Keys, size: int, workers: int, micro_batch: int
) -> None:
    assert take_steps(toy, 8, size, workers, micro_batch)[0] == whole[:8]


def test_stops_at_odd_places_leave_no_trace(toy: Path, whole: Keys) -> None:
    """2 -> 1 -> 3 workers on 1 -> 2 -> 4 ranks, then none: as if there had been no stop."""
    found: Keys = []
    state = None
    for steps, size, workers in ((1, 1, 2), (4, 2, 1), (7, 4, 3), (12, 1, 0)):
        keys, state = take_steps(toy, steps, size, workers, state=state)
        found += keys
    assert found == whole
    assert state is not None
    assert state["samples"] == 24 * GLOBAL_BATCH
    assert sum(source["taken"] for source in state["sources"].values()) == state["samples"]
    assert len(json.dumps(state)) < 500


def test_one_epoch_shows_every_sample_once(toy: Path) -> None:
    sources = [Source("text", str(toy / "sft/train" / "text"), "text", 1)]
    steps, _ = take_steps(toy, 8, 2, 1, sources=sources)
    seen = [Counter(itertools.chain(*steps[first : first + 4])) for first in (0, 4)]
    assert seen == [{f"text/text-{i:06d}": 1 for i in range(48)}] * 2
    assert steps[:4] != steps[4:]


def test_the_mixture_is_the_weights_in_every_step(toy: Path, whole: Keys) -> None:
    modalities = [[key.split("/")[0] for key in step] for step in whole]
    for name, weight in WEIGHTS.items():
        assert sum(step.count(name) for step in modalities) / 288 == pytest.approx(
            weight / 100, abs=0.01
        )
        assert all(abs(step.count(name) - weight * 0.12) < 2 for step in modalities)


def test_a_source_goes_on_when_others_come_and_go(toy: Path, whole: Keys) -> None:
    """Its samples are those that it would have given anyway."""
    names = ("image", "text")
    _, state = take_steps(toy, 5)
    new = [Source(n, str(toy / "sft/train" / n), "text", 1) for n in names]
    new.append(Source("heldout", str(toy / "sft/heldout/text"), "text", 1))
    after, _ = take_steps(toy, 5, state=state, sources=new)

    def of(name: str, steps: Keys) -> list[str]:
        return [key for step in steps for key in step if key.startswith(f"{name}/")]

    for name in names:
        expected, found = of(name, whole[5:]), of(name, after)
        assert abs(len(found) - 20) <= 2
        shorter = min(len(found), len(expected))
        assert found[:shorter] == expected[:shorter]
    assert abs(len(of("heldout", after)) - 20) <= 2


def test_seeds_give_other_orders(toy: Path, whole: Keys) -> None:
    assert take_steps(toy, 2, seed=6)[0] != whole[:2]


def test_the_first_batch_reads_its_own_samples_only(toy: Path, monkeypatch) -> None:
    """No buffer is filled before."""
    read: list[int] = []
    real = os.pread

    def counted(descriptor: int, size: int, offset: int) -> bytes:
        read.append(size)
        return real(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", counted)
    with open_loader(toy, shuffle_window=10_000, micro_batch=4) as loader:
        assert len(take(loader, 1)[0]) == 4
    assert len(read) == 4


def broken_samples() -> list[dict[str, Any]]:
    """Twelve good samples, and one of each kind of damage."""
    config = ToyConfig()
    good = [make_sample("sft/train/image", config, i) for i in range(12)]
    video = make_sample("sft/train/video", config, 0)
    image = make_sample("sft/train/image", config, 50)
    mismatch = json.loads(json.dumps(image["json"]))
    mismatch["messages"][0]["content"] = "no mark"
    mute = json.loads(json.dumps(image["json"]))
    mute["messages"][0]["content"], mute["messages"][1]["content"] = "Show it.", "<|image|>"
    return [
        *good,
        {**image, "__key__": "bad-json", "json": b"{"},
        {**image, "__key__": "bad-jpeg", "0.jpg": image["0.jpg"][:200]},
        {**image, "__key__": "bad-mark", "json": mismatch},
        {**image, "__key__": "bad-mute", "json": mute},
        {"__key__": "bad-missing", "json": image["json"]},
        {**video, "__key__": "bad-mp4", "0.mp4": video["0.mp4"][:3000]},
        {**video, "__key__": "bad-empty", "0.mp4": b""},
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_counted_logged_once_and_replaced(
    toy: Path, tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    write_shards(broken_samples(), tmp_path)
    prepare_index(tmp_path)
    sources = [Source("mine", str(tmp_path), "image", 1)]
    skipped: Counter[str] = Counter()
    keys: list[str] = []
    with (
        caplog.at_level(logging.WARNING),
        open_loader(toy, workers=workers, sources=sources) as loader,
    ):
        for batch in itertools.islice(loader, 57):  # three epochs
            skipped.update(batch.skipped)
            keys += batch.keys
    assert not any("bad" in key for key in keys)
    assert set(skipped) == {
        "bad_json", "undecodable_image", "mark_media_mismatch", "missing_media",
        "undecodable_video", "missing_text",
    }  # fmt: skip
    assert min(skipped.values()) >= 3  # counted in every epoch
    assert len(keys) == 57
    if workers == 0:
        lines = [record.getMessage() for record in caplog.records]
        assert sorted(line.split()[1] for line in lines) == [
            f"mine/bad-{name}"
            for name in ("empty", "jpeg", "json", "mark", "missing", "mp4", "mute")
        ]
        assert all("shard-000000.tar" in line for line in lines)


@pytest.mark.parametrize(("size", "workers"), [(1, 2), (2, 1), (4, 0)])
def test_every_layout_skips_counts_and_replaces_the_same(
    toy: Path, tmp_path: Path, size: int, workers: int
) -> None:
    write_shards(broken_samples(), tmp_path)
    prepare_index(tmp_path)
    sources = [Source("mine", str(tmp_path), "image", 1)]
    skipped: Counter[str] = Counter()

    def run(size: int, workers: int, steps: int, state: Any = None) -> tuple[Keys, Any]:
        skipped.clear()
        for rank in range(size):
            with open_loader(toy, rank, size, workers, sources=sources, state=state) as loader:
                for batch in itertools.islice(loader, steps * GLOBAL_BATCH // size):
                    skipped.update(batch.skipped)
        return take_steps(toy, steps, size, workers, sources=sources, state=state)

    whole, _ = run(1, 0, 6)
    counted = Counter(skipped)
    assert counted.total() > 24  # a third of 72 samples, and some of those in their place
    head, state = run(size, workers, 2)
    counted.subtract(skipped)
    tail, _ = run(1, 1, 4, state)
    counted.subtract(skipped)
    assert head + tail == whole
    assert not any(counted.values())


def test_nothing_but_bad_samples_ends_with_a_word(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards([{"__key__": f"s{i}", "json": b"{"} for i in range(10)], tmp_path)
    prepare_index(tmp_path)
    monkeypatch.setattr("data_pipeline.loader.samples.MAX_BAD_IN_A_ROW", 30)
    sources = [Source("mine", str(tmp_path), "text", 1)]
    for workers in (0, 1):
        with (
            open_loader(toy, workers=workers, sources=sources) as loader,
            pytest.raises(ShardError, match="30 samples in a row cannot be used"),
        ):
            take(loader, 1)


def test_workers_end_with_the_loader_and_a_dead_one_is_reported(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = open_loader(toy, workers=2)
    take(loader, 2)
    workers = loader.processes
    loader.close()
    assert [worker.is_alive() for worker in workers] == [False, False]

    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    monkeypatch.setattr("data_pipeline.loader.loader._END_S", 0.1)
    loader = open_loader(toy, workers=2)
    take(loader, 2)
    workers = loader.processes
    os.kill(workers[0].pid or 0, signal.SIGSTOP)
    loader.close()
    assert [worker.is_alive() for worker in workers] == [False, False]
    monkeypatch.undo()

    loader = open_loader(toy, workers=2)
    take(loader, 2)
    with pytest.raises(RuntimeError, match=r"worker.*(killed by signal|exited unexpectedly)"):
        take_after_kill(loader, 1)
    loader.close()


def test_its_processes_are_forks_of_this_one_however_python_starts_others(toy: Path) -> None:
    """Else those of a server, which a signal to all processes of a job ends, and them with it."""
    multiprocessing.set_start_method("forkserver", force=True)  # as Python 3.14 does
    try:
        with open_loader(toy, workers=2) as loader:
            take(loader, 1)
            assert {psutil.Process(one.pid).ppid() for one in loader.processes} == {os.getpid()}
    finally:
        multiprocessing.set_start_method(None, force=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"part": Part(2, 0, 0, 2)}, "micro_batch: 0"),
        ({"part": Part(2, 1, 2, 2)}, "data-parallel rank: 2"),
        ({"part": Part(3, 1, 0, 2)}, "global_batch: 3: must be a multiple of 1 x 2"),
        ({"workers": -1}, "workers: -1"),
        ({"sources": []}, "sources: none"),
        ({"sources": [Source("a", "x", "text", -1)]}, "source a: weight"),
        ({"sources": [Source("a", "x", "text", 1)] * 2}, "names must differ"),
        ({"sources": [Source("a", "/nowhere", "text", 1)]}, "/nowhere does not exist"),
        ({"state": {"samples": 3}}, "position in the data cannot be read"),
    ],
)
def test_a_wrong_argument_is_named(toy: Path, changes: dict[str, Any], said: str) -> None:
    options: dict[str, Any] = {
        "sources": [Source("text", str(toy / "sft/train" / "text"), "text", 1)],
        "encode": encode_config(toy), "part": Part(2, 1, 0, 2), "workers": 0, "seed": 0,
        "shuffle_window": 0, **changes,
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
