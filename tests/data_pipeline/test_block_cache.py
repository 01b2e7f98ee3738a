"""The cache stays within its bound, whoever writes and dies, and gives back what was put."""

from __future__ import annotations

import fcntl
import itertools
import multiprocessing
import os
import shutil
from hashlib import sha256
from pathlib import Path

import pytest

from data_pipeline.block_cache import BlockCache

SIZE, MOST = 4096, 20 * 4096
FORK = multiprocessing.get_context("fork")


def block(number: int) -> tuple[str, bytes]:
    digest = sha256(str(number).encode()).digest()
    return digest.hex(), digest * (SIZE // len(digest))


def held(folder: Path) -> int:
    """Bytes in the cache while nobody writes."""
    if not folder.exists():
        return 0
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(path.stat().st_size for path in folder.glob("??/*"))


def work(folder: Path, seed: int, rounds: int, killed: Path) -> None:
    """As many rounds after the file `killed` is there, and all before."""
    cache, left = BlockCache(folder, MOST), rounds
    for i in itertools.count():
        left -= killed.exists()
        if left < 0:
            os._exit(0)
        name, data = block((i * 7 + seed * 13) % 60)
        found = cache.get(name, SIZE)
        if found is None:
            cache.put(name, data)
        elif found != data:
            os._exit(3)


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "c", MOST)
    for number in range(20):
        cache.put(*block(number))
        os.utime(cache._path(block(number)[0]), (number, number))
    assert cache.get(block(0)[0], SIZE) == block(0)[1]  # now the last used
    cache.put(*block(20))
    kept = [n for n in range(21) if cache.get(block(n)[0], SIZE)]
    assert kept == [0, *range(4, 21)], "down to nine tenths, the new one among them"
    assert held(tmp_path / "c") == 18 * SIZE


def test_many_processes_stay_within_the_bound_and_a_killed_one_harms_none(tmp_path: Path) -> None:
    folder, killed, most = tmp_path / "c", tmp_path / "killed", 0
    workers = [FORK.Process(target=work, args=(folder, n, 150, killed)) for n in range(3)]
    for worker in workers:
        worker.start()
    try:
        while most <= MOST // 2:
            most = max(most, held(folder))
            assert all(worker.is_alive() for worker in workers)
        workers[0].kill()
        workers[0].join()
        killed.touch()
        while any(worker.is_alive() for worker in workers):
            most = max(most, held(folder))
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    assert [worker.exitcode for worker in workers] == [-9, 0, 0]
    assert most <= MOST


def test_what_is_cut_off_is_not_given_and_what_cannot_be_written_not_kept(tmp_path: Path) -> None:
    cache, (name, data) = BlockCache(tmp_path / "c", MOST), block(1)
    cache.put(name, data)
    (path,) = (tmp_path / "c").glob("??/*")
    path.write_bytes(data[:-1])
    assert cache.get(name, SIZE) is None
    (tmp_path / "file").write_text("")
    blocked = BlockCache(tmp_path / "file", MOST)
    blocked.put(name, data)
    assert blocked.get(name, SIZE) is None
    nothing = BlockCache(tmp_path / "n", 0)
    nothing.put(name, data)
    assert not (tmp_path / "n").exists()


def test_a_folder_that_is_removed_meanwhile_costs_the_block_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, real = BlockCache(tmp_path / "c", MOST), Path.write_bytes

    def remove_first(path: Path, data: bytes) -> int:
        shutil.rmtree(path.parent)
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", remove_first)
    cache.put(*block(1))
    monkeypatch.undo()
    assert cache.get(block(1)[0], SIZE) is None
    cache.put(*block(1))
    assert cache.get(block(1)[0], SIZE) == block(1)[1]
