"""Shards of object stores: the same samples in the same order as from folders, and what fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data_pipeline import stored_files
from data_pipeline.index import prepare_index
from data_pipeline.loader.loader import Loader
from data_pipeline.loader.order import Pick, turns
from data_pipeline.loader.remote import samples_in_order
from data_pipeline.loader.state import Source
from data_pipeline.shards import ShardError, check_source, read_samples, write_shards
from data_pipeline.stores import StoreError, StoreOptions
from tests.data_pipeline.loader.test_loader import WEIGHTS, open_loader, take
from tests.data_pipeline.s3 import Server, s3_server
from tests.data_pipeline.test_block_cache import held


@pytest.fixture(scope="module")
def server(toy: Path) -> Iterator[Server]:
    """With the toy world's shards in `s3://bucket/toy`."""
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as started:
        system = fsspec.filesystem("s3", skip_instance_cache=True)
        for path in (toy / "sft/train").rglob("*"):
            if path.is_file():
                system.pipe_file(
                    f"bucket/toy/{path.relative_to(toy / 'sft/train')}", path.read_bytes()
                )
        yield started


def options(folder: Path, **changes: Any) -> StoreOptions:
    return StoreOptions(**{"cache": str(folder), "retries": 2, "timeout": 20.0, **changes})


def opened(toy: Path, root: str, stores: StoreOptions, workers: int = 0) -> Loader:
    sources = [Source(name, f"{root}/{name}", name, w) for name, w in WEIGHTS.items()]  # type: ignore[arg-type]
    return open_loader(toy, workers=workers, micro_batch=2, sources=sources, stores=stores)


def test_samples_and_order_are_those_of_the_folder(
    toy: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_files, "BLOCK", 1 << 14)  # the toy world's shards are small
    with open_loader(toy, micro_batch=2) as loader:
        local, state = take(loader, 24), loader.state(6)
        there = list(zip(range(6), loader, strict=False))
    stores = options(tmp_path, cache_size=0.0003)
    for workers in (0, 2):
        with opened(toy, "s3://bucket/toy", stores, workers) as loader:
            assert take(loader, 24) == local
            assert loader.state(6) == state
            for (_, mine), (_, theirs) in zip(
                zip(range(6), loader, strict=False), there, strict=True
            ):
                assert mine.keys == theirs.keys
                assert mine.tokens.equal(theirs.tokens)
                assert mine.frames.equal(theirs.frames)
        assert 100_000 < held(tmp_path) <= 300_000, "the bound of the cache"


def test_what_is_in_the_cache_is_not_asked_for_again(
    toy: Path, server: Server, tmp_path: Path
) -> None:
    # A folder of its own: of others the server may still be asked what earlier loaders wanted.
    folder, whole = toy / "sft/train/image", list(read_samples(toy / "sft/train/image"))
    fsspec.filesystem("s3").put(f"{folder}/", "bucket/alone/", recursive=True)
    for shards_asked in (2, 0):
        server.requests.clear()
        found = list(samples_in_order("s3://bucket/alone", options(tmp_path), 1, 20, 3))
        assert found == whole[1:20:3]
        asked = [
            name
            for name in server.requests
            if name.startswith("GET /bucket/alone/") and name.endswith(".tar")
        ]
        assert len(asked) == shards_asked


def test_a_shard_that_is_another_one_now_is_not_taken_from_the_cache(
    toy: Path, server: Server, tmp_path: Path
) -> None:
    system, url = fsspec.filesystem("s3"), "s3://bucket/toy/text"
    before = list(samples_in_order(url, options(tmp_path)))
    shard = f"{url}/shard-000000.tar"
    data = system.cat_file(shard)
    changed = data.replace(b'"content"', b'"CONTENT"', 1)
    system.pipe_file(shard, changed)
    try:
        assert next(samples_in_order(url, options(tmp_path))) != before[0]
    finally:
        system.pipe_file(shard, data)


def test_a_store_that_fails_and_comes_back_is_read(server: Server, tmp_path: Path) -> None:
    shard = "/bucket/toy/video/shard-000000.tar"
    server.fail[shard] = 3
    assert len(list(samples_in_order("s3://bucket/toy/video", options(tmp_path), most=3))) == 3
    assert server.fail[shard] == 0


def test_a_store_out_of_reach_ends_it_with_one_error_that_names_the_url(
    toy: Path, tmp_path: Path
) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(toy / "sft/train/text"), "/toy/text", recursive=True)
    source = [Source("text", "memory://toy/text", "text", 1.0)]
    with pytest.MonkeyPatch.context() as patch:
        fails = iter([True, True, False])
        real = type(memory).cat_file

        def cat(self: Any, path: str, *rest: Any, **named: Any) -> bytes:
            if path.endswith(".tar") and next(fails, False):
                raise ConnectionResetError("reset")
            return real(self, path, *rest, **named)

        patch.setattr(type(memory), "cat_file", cat)
        with open_loader(toy, sources=source, stores=options(tmp_path, read_ahead=0)) as loader:
            assert len(take(loader, 3)) == 3
        fails = iter([True] * 10**6)
        for workers in (0, 1):
            stores = options(tmp_path / "other", retries=1)
            with (
                open_loader(toy, workers=workers, sources=source, stores=stores) as loader,
                pytest.raises(
                    OSError, match=r"memory://toy/text/shard-\d+.tar cannot be read, tried 2"
                ),
            ):
                take(loader, 1)
    with pytest.raises(ShardError, match="memory://none does not exist"):
        check_source("memory://none")
    memory.rm("/toy/text/.nv-meta", recursive=True)
    with pytest.raises(ShardError, match="memory://toy/text has no complete index: run"):
        check_source("memory://toy/text")
    assert issubclass(StoreError, OSError)


def test_a_process_hears_of_its_microbatches_before_their_turn() -> None:
    batches = ([Pick(n, 0, n)] for n in range(1000))
    given = turns(iter(batches), processes=3, ahead=2)
    heard: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    for number in range(30):
        turn = next(given)
        assert [pick.number for pick in turn.picks] == [number]
        mine = heard[number % 3]
        assert number < 3 or number in mine
        told = {pick.number for pick in turn.ahead}
        assert not told & mine, "said once"
        mine |= told
        assert {number + 3, number + 6} <= mine
    assert not any(next(turns(iter([[Pick(0, 0, 0)]]), 3, 0)).ahead)


def test_a_web_server_that_sends_no_parts_of_files_is_told_at_once(tmp_path: Path) -> None:
    """Python's own does not: it sends the whole shard for each part that is asked for."""
    folder, sent = tmp_path / "web/set", list[str]()

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, *_: Any) -> None:
            sent.append(f"{self.command} {self.path}")

    write_shards(
        ({"__key__": str(number), "json": {}, "0.bin": bytes(1 << 20)} for number in range(3)),
        folder,
    )
    prepare_index(folder)
    handler = partial(Handler, directory=str(folder.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{running.server_port}/set"
        with pytest.raises(StoreError, match=f"{url}/shard-000000.tar cannot be read: .*ranges"):
            next(samples_in_order(url, options(tmp_path / "cache", read_ahead=0)))
        running.shutdown()
    assert sent.count("GET /set/shard-000000.tar") == 1
