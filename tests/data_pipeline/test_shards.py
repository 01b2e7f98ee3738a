from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.index import prepare_index
from data_pipeline.shards import ShardError, SourceInfo, check_source, shard_files, write_shards
from tests.torchrun import REPO
from tests.waiting import running, until


def _samples(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"__key__": f"s{i:03d}", "json": {"n": i}, "0.jpg": bytes([i])}
        for i in range(first, first + count)
    ]


def _members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]


def test_shards_hold_the_samples_in_order(tmp_path: Path) -> None:
    shards = write_shards(_samples(5), tmp_path, samples_per_shard=2)
    assert [shard.name for shard in shards] == [f"shard-00000{i}.tar" for i in range(3)]
    assert sorted(tmp_path.iterdir()) == shards
    members = _members(shards[2])
    assert members["s004.0.jpg"] == b"\x04"
    assert json.loads(members["s004.json"]) == {"n": 4}


def test_the_same_samples_make_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_shards(_samples(3), tmp_path / name)[0] for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_an_exception_leaves_no_short_shard(tmp_path: Path) -> None:
    def failing() -> Any:
        yield from _samples(3)
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        write_shards(failing(), tmp_path, samples_per_shard=2)
    assert [path.name for path in tmp_path.glob("*.tar")] == ["shard-000000.tar"]
    assert len(_members(tmp_path / "shard-000000.tar")) == 4


def test_a_killed_writer_leaves_whole_shards_only(tmp_path: Path) -> None:
    program = """
import itertools, sys, time
from data_pipeline.shards import write_shards
def endless():
    for i in itertools.count():
        time.sleep(0.001)
        yield {"__key__": f"s{i}", "json": {"n": i}, "0.jpg": bytes(5000)}
write_shards(endless(), sys.argv[1], samples_per_shard=20)
"""
    with running([sys.executable, "-c", program, str(tmp_path)], cwd=REPO):
        until(lambda: len(list(tmp_path.glob("*.tar"))) >= 3)
    shards = sorted(tmp_path.glob("*.tar"))
    assert {len(_members(shard)) for shard in shards} == {40}
    assert prepare_index(tmp_path).samples == 20 * len(shards)


@pytest.mark.parametrize("key", ["", "a.b", "__a", 3])
def test_a_bad_key_is_named(tmp_path: Path, key: Any) -> None:
    with pytest.raises(ShardError, match="__key__"):
        write_shards([{"__key__": key, "json": {}}], tmp_path)


def test_a_key_used_twice_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="'s000' is used twice"):
        write_shards(_samples(1) * 2, tmp_path)
    write_shards(_samples(1), tmp_path / "x", prefix="a")
    (tmp_path / "x" / "a-000001.tar").write_bytes((tmp_path / "x" / "a-000000.tar").read_bytes())
    with pytest.raises(ShardError, match="s000"):
        prepare_index(tmp_path / "x")


def test_existing_shards_and_no_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no samples"):
        write_shards([], tmp_path / "empty")
    write_shards(_samples(1), tmp_path)
    with pytest.raises(ShardError, match="already holds shards"):
        write_shards(_samples(1), tmp_path)


def test_a_source_is_checked_before_it_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    with pytest.raises(ShardError, match="does not exist"):
        check_source(folder)
    folder.mkdir()
    with pytest.raises(ShardError, match=r"no \.tar shards"):
        check_source(folder)
    write_shards(_samples(5), folder, samples_per_shard=2)
    with pytest.raises(ShardError, match=r"no complete index: run `python -m data_pipeline.index"):
        check_source(folder)
    assert prepare_index(folder) == SourceInfo(shards=3, samples=5)
    assert check_source(folder) == SourceInfo(shards=3, samples=5)
    (folder / "shard-000002.tar").unlink()
    with pytest.raises(ShardError, match=r"does not match the shards \(shard-000002.tar\)"):
        check_source(folder)
    assert prepare_index(folder) == SourceInfo(shards=2, samples=4)


def test_a_shard_or_a_pattern_is_no_folder_of_shards(tmp_path: Path) -> None:
    (tmp_path / "shard-000000.tar").touch()
    with pytest.raises(ShardError, match=r"\.tar is a file: give the folder that holds it"):
        shard_files(tmp_path / "shard-000000.tar")
    for pattern in ("*.tar", "shard-{000000..000009}.tar"):
        with pytest.raises(ShardError, match="does not exist: give a folder, all of whose shards"):
            shard_files(tmp_path / pattern)


def test_the_index_is_the_one_energon_makes(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        write_shards(_samples(5), tmp_path / name, samples_per_shard=2)
    prepare_index(tmp_path / "ours")
    command = [sys.executable, "-m", "megatron.energon.cli.main", "prepare", "--non-interactive"]
    command += ["--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset"]
    subprocess.run([*command, str(tmp_path / "theirs")], check=True, capture_output=True)
    ours, theirs = (tmp_path / name / ".nv-meta" for name in ("ours", "theirs"))
    assert {file.name for file in ours.iterdir()} == {file.name for file in theirs.iterdir()}
    for name in (".info.json", "split.yaml"):
        assert (ours / name).read_text() == (theirs / name).read_text()
    read = [yaml.safe_load((folder / "dataset.yaml").read_text()) for folder in (ours, theirs)]
    assert read[0] == read[1]
    assert check_source(tmp_path / "theirs") == SourceInfo(shards=3, samples=5)
