"""Shards that break under a running job, and members of samples that no one would write."""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import json
import logging
import os
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.encode import SampleEncoder
from data_pipeline.index import prepare_index
from data_pipeline.loader.loader import Loader, build_loader
from data_pipeline.loader.order import Part
from data_pipeline.loader.reader import OpenShards, SourceReader
from data_pipeline.loader.state import Source
from data_pipeline.schema import SampleError, parse_sample
from data_pipeline.shards import ShardError, training_shards, write_shards
from data_pipeline.tokens import load_tokenizer
from data_pipeline.toy.build import ToyConfig, make_sample
from tests.data_pipeline.loader.test_loader import encode_config, take_after_kill

SECONDS = 20.0  # of this process's own work: no single sample takes longer


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three indexed shards of ten pictures."""
    out = tmp_path_factory.mktemp("pristine")
    samples = [make_sample("sft/train/image", ToyConfig(), i) for i in range(30)]
    write_shards(samples, out, samples_per_shard=10)
    prepare_index(out)
    return out


@pytest.fixture
def shards(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "shards"))


def open_shards(toy: Path, shards: Path, workers: int = 0) -> Loader:
    """They are read in order, a sample a batch."""
    return build_loader(
        [Source("mine", str(shards), "image", 1)], encode_config(toy),
        Part(1, micro_batch=1, rank=0, size=1), workers=workers, seed=1, shuffle_window=0,
    )  # fmt: skip


def read(loader: Loader, count: int) -> tuple[list[str], Counter[str]]:
    """Keys of the next batches, and what was skipped on the way."""
    keys: list[str] = []
    skipped: Counter[str] = Counter()
    for batch in itertools.islice(loader, count):
        keys += batch.keys
        skipped.update(batch.skipped)
    return keys, skipped


def key(number: int) -> str:
    return f"mine/image-{number:06d}"


def good_ones(keys: list[str], expected: list[str], bad: set[int], shards: int) -> None:
    """`keys` are `expected`, but for the numbers `bad`, in whose place others stand."""
    places = [place for place, wanted in enumerate(expected) if wanted in {key(i) for i in bad}]
    assert len(keys) == len(expected)
    for place, (found, wanted) in enumerate(zip(keys, expected, strict=True)):
        if place in places:
            assert found in {key(i) for i in range(10 * shards) if i not in bad}
        else:
            assert found == wanted


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_tail_costs_the_samples_in_it(
    toy: Path, shards: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    """The second of three shards is cut after its sixth sample, in the seventh's picture."""
    path = shards / "shard-000001.tar"
    offsets = (shards / "shard-000001.tar.idx").read_bytes()
    seventh = int.from_bytes(offsets[6 * 8 : 7 * 8], "little")
    os.truncate(path, seventh + 700)
    with caplog.at_level(logging.WARNING), open_shards(toy, shards, workers) as loader:
        keys, skipped = read(loader, 60)
    good_ones(keys, [key(i) for i in range(30)] * 2, {16, 17, 18, 19}, 3)
    assert skipped.keys() == {"unreadable_shard"}
    assert skipped.total() >= 8  # those that stand for others may be bad, too
    if workers == 0:
        lines = [record.getMessage() for record in caplog.records]
        found = [re.match(r"skipped mine/(\S+) of (\S+): unreadable_shard: \w", s) for s in lines]
        assert [(m[1], m[2]) for m in found if m] == [
            (f"shard-000001.tar#{place}", "shard-000001.tar") for place in (6, 7, 8, 9)
        ]


def test_garbage_in_the_middle_costs_the_samples_there(toy: Path, shards: Path) -> None:
    path = shards / "shard-000000.tar"
    offsets = (shards / "shard-000000.tar.idx").read_bytes()
    third = int.from_bytes(offsets[3 * 8 : 4 * 8], "little")
    with path.open("r+b") as file:
        file.seek(third)
        file.write(b"\xaa" * 600)
    with open_shards(toy, shards) as loader:
        keys, skipped = read(loader, 30)
    good_ones(keys, [key(i) for i in range(30)], {3}, 3)
    assert skipped == {"unreadable_shard": 1}


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000001.tar.idx"])
def test_a_shard_deleted_while_it_runs_is_missed_and_nothing_else(
    toy: Path, shards: Path, name: str
) -> None:
    with open_shards(toy, shards) as loader:
        assert read(loader, 5) == ([key(i) for i in range(5)], Counter())
        (shards / name).unlink()
        keys, skipped = read(loader, 25)
        good_ones(keys, [key(i) for i in range(5, 30)], set(range(10, 20)), 3)
        assert skipped.keys() == {"unreadable_shard"}
        assert skipped.total() >= 10


def test_a_shard_that_comes_back_is_read_again(toy: Path, shards: Path) -> None:
    path = shards / "shard-000001.tar"
    with open_shards(toy, shards) as loader:
        path.rename(shards / "away")
        assert read(loader, 30)[1].total() >= 10
        (shards / "away").rename(path)
        assert read(loader, 30) == ([key(i) for i in range(30)], Counter())


def test_few_shards_are_open_at_a_time(
    toy: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.loader.reader._OPEN", 2)
    opened = OpenShards()
    reader = SourceReader("mine", str(shards), training_shards(shards), opened)

    assert descriptors(shards) == 0
    for _ in range(2):
        assert [reader.read(i)[0] for i in (0, 11, 22, 3)] == [
            f"image-{i:06d}" for i in (0, 11, 22, 3)
        ]
        assert descriptors(shards) == 2
    del reader, opened
    assert descriptors(shards) == 0


def descriptors(shards: Path) -> int:
    """Those of these shards: other threads may open and close files of their own."""
    return sum(file.path.startswith(str(shards)) for file in psutil.Process().open_files())


def test_a_loader_that_is_closed_has_no_shard_open(toy: Path, shards: Path) -> None:
    loader = open_shards(toy, shards)
    read(loader, 11)
    assert descriptors(shards) == 2
    loader.close()
    assert descriptors(shards) == 0


def test_batches_of_worker_processes_hold_no_file(toy: Path, shards: Path) -> None:
    """A step may have thousands, and a shell often allows 1024."""
    with open_shards(toy, shards, workers=1) as loader:
        held = list(itertools.islice(loader, 1))
        before = psutil.Process().num_fds()
        held += itertools.islice(loader, 40)
        assert psutil.Process().num_fds() < before + 40
        assert len({batch.keys[0] for batch in held}) > 20


def test_a_killed_worker_ends_the_reading_with_its_signal(toy: Path, shards: Path) -> None:
    with open_shards(toy, shards, workers=2) as loader:
        read(loader, 2)
        with pytest.raises(RuntimeError, match=r"worker.*(killed by signal|exited unexpectedly)"):
            take_after_kill(loader, 0)


def open_reader(shards: Path) -> SourceReader:
    return SourceReader("mine", str(shards), training_shards(shards), OpenShards())


@settings(max_examples=100)
@given(data=st.data())
def test_any_damage_to_a_shard_is_survived(
    pristine: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes overwritten, cut out or inserted anywhere: the other shards are read as they are."""
    intact = [open_reader(pristine).read(number) for number in range(30)]
    shards = Path(shutil.copytree(pristine, tmp_path_factory.mktemp("fuzz") / "shards"))
    path = shards / data.draw(st.sampled_from(["shard-000001.tar", "shard-000001.tar.idx"]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content)))
        end = place + data.draw(st.sampled_from([0, 1, 8, 512, 100_000]))
        content[place:end] = data.draw(st.binary(max_size=600))
    path.write_bytes(content)
    reader = open_reader(shards)
    began = time.process_time()
    for number in [*range(30), *range(30)]:  # what failed once leaves the next reads alone
        if 10 <= number < 20:
            with contextlib.suppress(ShardError):
                reader.read(number)
        else:
            assert reader.read(number) == intact[number]
    assert time.process_time() - began < SECONDS
    shutil.rmtree(shards)


@pytest.fixture(scope="module")
def encoder(toy: Path) -> SampleEncoder:
    config = encode_config(toy, prompt="chat")
    return SampleEncoder(config, load_tokenizer(config.tokenizer))


def is_refused_or_encoded(encoder: SampleEncoder, parts: dict[str, bytes]) -> None:
    """Anything but an error that the task encoder would have to call unexpected."""
    began = time.process_time()
    try:
        sample = encoder.encode("k", parts)
    except SampleError as error:
        said = (error.key, bool(error.reason))
    else:
        said = ("k", len(sample.frames) == len(sample.frame_positions))
    assert said == ("k", True)
    assert time.process_time() - began < SECONDS


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
CONTENT = st.lists(
    st.sampled_from(["<|video|>", "<|image|>", "<|silence|>", "<|eot_id|>", "a", "\x00", "\ud800"])
).map("".join)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": CONTENT | JSON}
)
MEDIUM = st.fixed_dictionaries(
    {"type": st.sampled_from(["image", "video", "sound"]), "file": st.sampled_from(["0.jpg", "x"])},
    optional={"times": st.lists(st.floats() | st.integers()) | JSON},
)
RECORD = st.fixed_dictionaries(
    {
        "messages": st.lists(MESSAGE | JSON, max_size=4),
        "media": st.lists(MEDIUM | JSON, max_size=3),
    },
    optional={"kind": st.sampled_from(["chat", "caption", "realtime", "?"])},
)


@example(raw=b'{"messages": [{"role": "assistant", "content": "\\ud800"}], "media": []}')
@given(raw=st.binary(max_size=60) | (JSON | RECORD).map(lambda value: json.dumps(value).encode()))
def test_any_json_is_refused_or_encoded(encoder: SampleEncoder, raw: bytes) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "JPEG")
    is_refused_or_encoded(encoder, {"json": raw, "0.jpg": picture.getvalue()})


@pytest.mark.parametrize(
    "raw", [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000, b"\xff\xfe", b"", b"NaN", b"{}"]
)
def test_json_that_is_deep_or_long_or_none(raw: bytes) -> None:
    with pytest.raises(SampleError, match=r"bad_json|bad_schema"):
        parse_sample("k", raw)


@pytest.mark.parametrize("kind", ["image", "video"])
@settings(max_examples=60)
@given(data=st.data())
def test_any_damage_to_media_is_refused_or_encoded(
    encoder: SampleEncoder, kind: str, data: st.DataObject
) -> None:
    sample = make_sample(f"sft/train/{kind}", ToyConfig(), 0)
    name = next(name for name in sample if name.startswith("0."))
    content = bytearray(sample[name])
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(0, len(content)))
        end = place + data.draw(st.sampled_from([0, 1, 4, 100, 10_000]))
        content[place:end] = data.draw(st.binary(max_size=8))
    parts = {"json": json.dumps(sample["json"]).encode(), name: bytes(content)}
    is_refused_or_encoded(encoder, parts)


def test_a_sample_of_more_than_two_gigabytes_is_read_whole(tmp_path: Path) -> None:
    """In pieces, since Linux reads no more at once; here of a few bytes."""
    shard, data = tmp_path / "shard-000000.tar", bytes(range(256)) * 3
    shard.write_bytes(data)
    np.array([0, 5, 768], "<u8").tofile(f"{shard}.idx")
    for at_once in (1, 4, 5, 762, 763, 1 << 30):
        opened = OpenShards(at_once)
        assert [opened.read(str(shard), place) for place in (0, 1)] == [data[:5], data[5:]]
    assert inspect.signature(OpenShards).parameters["at_once"].default <= 0x7FFFF000
