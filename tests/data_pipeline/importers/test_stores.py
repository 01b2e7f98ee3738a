"""Imports from object stores: what they make is what an import of the same folder makes."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from data_pipeline import files
from data_pipeline.build import BuildOptions, build_shards
from data_pipeline.importers.draft import Draft, Entry, Medium
from data_pipeline.importers.forms import SourceOptions
from data_pipeline.importers.prefetch import read_ahead
from data_pipeline.loader.remote import samples_in_order
from data_pipeline.shards import ShardError, read_samples
from data_pipeline.stores import StoreOptions
from tests.data_pipeline.hub import hub
from tests.data_pipeline.importers.jobs import contents
from tests.data_pipeline.s3 import Server, s3_server
from tests.data_pipeline.test_block_cache import held
from tests.samples import imported
from tools.shards.__main__ import main as shards


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as started:
        yield started


@pytest.fixture
def source(folder: Path, server: Server) -> Path:
    """Records about one clip, one that is not there, and pictures; shards of others. In the folder,
    and in `s3://bucket/in`."""
    rng = np.random.default_rng(0)
    for name in ("p", "q"):
        pixels = rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    with (folder / "r.jsonl").open("w") as file:
        for n, (field, medium) in enumerate(
            (("videos", "a.mp4"), ("images", "p.png"), ("videos", "a.mp4"), ("videos", "gone.mp4"),
             ("images", "q.png"), ("videos", "a.mp4"))
        ):  # fmt: skip
            mark = "<|video|>" if field == "videos" else "<|image|>"
            turns = [
                {"role": "user", "content": f"{mark}?"},
                {"role": "assistant", "content": f"Answer {n}"},
            ]
            file.write(json.dumps({"messages": turns, field: [medium]}) + "\n")
    with tarfile.open(folder / "w.tar", "w") as tar:
        for name, data in (("1.png", (folder / "p.png").read_bytes()), ("1.txt", b"Noise")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    for path in folder.iterdir():
        system.pipe_file(f"bucket/in/{path.name}", path.read_bytes())
    server.requests.clear()
    return folder


def options(cache: Path, **changes: Any) -> BuildOptions:
    stores = {"cache": str(cache), "retries": 3, "timeout": 20.0, **changes}
    return BuildOptions(stores=StoreOptions(**stores))


def without_paths(found: dict[str, str]) -> dict[str, str]:
    """Details of rejected records name the path that was tried."""
    return {name: digest for name, digest in found.items() if name != "rejected.jsonl"}


def test_records_media_and_tars_of_a_store_are_those_of_the_folder(
    source: Path, server: Server, tmp_path: Path
) -> None:
    here, there, cache = tmp_path / "here", tmp_path / "there", tmp_path / "cache"
    build_shards(source / "r.jsonl", here)
    clip = "/bucket/in/a.mp4"
    server.fail[clip] = 2
    summary = build_shards("s3://bucket/in/r.jsonl", there, options(cache))
    assert summary.rejected == {"missing_file": 1}
    assert without_paths(contents(there)) == without_paths(contents(here))
    assert (server.requests[f"GET {clip}"], server.fail[clip]) == (1, 0), "three records show it"
    server.requests.clear()
    build_shards("s3://bucket/in/r.jsonl", tmp_path / "again", options(cache))
    assert not [name for name in server.requests if name.startswith("GET") and "in/" in name
                and not name.endswith("/gone.mp4")]  # fmt: skip
    assert 0 < held(cache) < 1e6

    mixed = replace(options(cache), source=SourceOptions(media_dir="s3://bucket/in"))
    local = build_shards(source / "r.jsonl", tmp_path / "mixed", mixed)
    assert local.imported == {"video": 3, "image": 2}
    one = build_shards("s3://bucket/in/w.tar", tmp_path / "tar", options(cache, cache_size=0))
    assert one.imported == {"image": 1}
    (sample,) = imported(tmp_path / "tar").values()
    assert list(sample["members"].values()) == [(source / "p.png").read_bytes()]


def test_parts_are_made_from_a_store_by_processes(source: Path, tmp_path: Path) -> None:
    made = ["--parts", "2", "--workers", "2"]
    assert shards(["build", str(source / "r.jsonl"), str(tmp_path / "here"), *made]) == 0
    cache = ["--cache", str(tmp_path / "cache"), "--read-ahead", "2"]
    url = "s3://bucket/in/r.jsonl"
    assert shards(["build", url, str(tmp_path / "there"), *made, *cache]) == 0
    assert without_paths(contents(tmp_path / "there")) == without_paths(contents(tmp_path / "here"))


def test_data_sets_of_a_hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.get_filesystem_class("hf").clear_instance_cache()
    here, there, stores = tmp_path / "here", tmp_path / "there", options(tmp_path / "cache")
    build_shards(source / "r.jsonl", here)
    with hub(monkeypatch) as files_of_hub:
        for root, name in ((source, "in"), (here / "image", "shards")):
            paths = [path for path in root.rglob("*") if path.is_file()]
            files_of_hub |= {f"{name}/{p.relative_to(root)}": p.read_bytes() for p in paths}
        summary = build_shards("hf://datasets/user/set/in/r.jsonl", there, stores)
        assert summary.rejected == {"missing_file": 1}
        assert without_paths(contents(there)) == without_paths(contents(here))
        found = samples_in_order("hf://datasets/user/set/shards", stores.stores)
        assert list(found) == list(read_samples(here / "image"))


def test_media_are_fetched_before_their_turn(tmp_path: Path) -> None:
    memory, asked = fsspec.filesystem("memory"), []

    def entries() -> Iterator[Entry]:
        for n in range(9):
            memory.pipe_file(f"/ahead/{n}", bytes(1000))
            asked.append(n)
            draft = Draft([], [Medium("image", f"memory://ahead/{n}")])
            yield Entry(f"{n}", "r", 0.0, draft, n)

    stores = StoreOptions(cache=str(tmp_path), read_ahead=3)
    files.use_stores(stores)
    coming = read_ahead(entries(), stores)
    assert next(coming).key == "0"
    assert asked == [0, 1, 2, 3]
    assert [entry.key for entry in coming] == [str(n) for n in range(1, 9)]
    assert held(tmp_path) == 9000
    memory.rm("/ahead", recursive=True)
    for n in range(9):
        assert files.read_bytes(f"memory://ahead/{n}") == bytes(1000)
    assert [e.key for e in read_ahead(entries(), StoreOptions(cache_size=0))] == [
        *map(str, range(9))
    ]


def test_what_is_said_of_a_url_has_no_password_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "http://me:hidden@127.0.0.1:1/x.{}?X-Amz-Signature=hidden"  # where nobody listens
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "ok"}]
    record = {"messages": turns, "images": [url.format("jpg")]}
    (tmp_path / "r.jsonl").write_text(json.dumps(record) + "\n")
    summary = build_shards(tmp_path / "r.jsonl", tmp_path / "out", BuildOptions())
    assert summary.rejected == {"missing_file": 1}
    rejected = (tmp_path / "out" / "rejected.jsonl").read_text()
    assert "http://***@127.0.0.1:1/x.jpg?X-Amz-Signature=***" in rejected
    with pytest.raises(ShardError) as caught:
        build_shards(url.format("jsonl"), tmp_path / "out2", BuildOptions())
    said = capsys.readouterr()
    assert "hidden" not in f"{rejected}{caught.value}{said.out}{said.err}"
    assert "http://***@127.0.0.1:1/x.jsonl" in str(caught.value)
