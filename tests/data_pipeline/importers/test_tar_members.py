"""Members that tar itself makes: sparse files (`tar -S`) and links between files."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.index import prepare_index
from data_pipeline.loader.reader import OpenShards, SourceReader
from data_pipeline.shards import training_shards
from tests.data_pipeline.importers.realtime import run, said, write

HOLE = 1 << 20  # bytes


def paint(path: Path, colour: str) -> bytes:
    """Makes a PNG with a hole behind it that takes no place on the disk; returns its bytes."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(out, "PNG")
    with path.open("wb") as file:
        file.write(out.getvalue())
        file.seek(HOLE, os.SEEK_CUR)
        file.write(b"end")
    return path.read_bytes()


def pack(folder: Path, kind: str, *names: str) -> Path:
    """The files below a folder in a tar, without their holes."""
    command = ["tar", "--sparse", f"--format={kind}", "-cf", "a.tar", *names]
    subprocess.run(command, cwd=folder, check=True)
    assert (folder / "a.tar").stat().st_size < HOLE
    return folder / "a.tar"


@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_sparse_members_have_their_holes(folder: Path, tmp_path: Path, kind: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    pictures = [paint(inside / "1.png", "red"), paint(inside / "2.png", "lime")]
    (inside / "1.txt").write_text("red")
    (inside / "2.txt").write_text("lime")
    names = ["1.png", "1.txt", "2.png", "2.txt"]
    shard = Path(shutil.move(pack(inside, kind, *names), folder / "a.tar"))
    samples, summary = run(shard)
    assert [said(sample)[-1] for sample in samples] == ["red", "lime"]
    assert summary.rejected == {}
    out = sorted(folder.parent.glob("out-*"))[-1] / "image"
    for source in (out, prepared(shard, tmp_path / "source")):
        reader = SourceReader("a", str(source), training_shards(source), OpenShards())
        for number, data in enumerate(pictures):
            _, parts = reader.read(number)
            assert next(parts[name] for name in parts if name.endswith("png")) == data


def prepared(shard: Path, folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(shard, folder)
    assert prepare_index(folder).samples == 2
    return folder


def test_a_link_to_a_medium_in_a_tar_is_that_medium(folder: Path, tmp_path: Path) -> None:
    """Files that are there twice are often links: tar keeps the second one as such."""
    inside = tmp_path / "inside"
    for name in ("a", "b", "c", "d"):
        (inside / name).mkdir(parents=True)
    paint(inside / "a/1.png", "red")
    os.link(inside / "a/1.png", inside / "b/2.png")
    (inside / "c/3.png").symlink_to("../b/2.png")
    (inside / "d/1.png").symlink_to("../a/1.png")
    (inside / "d/round.png").symlink_to("round.png")
    shutil.move(pack(inside, "gnu", "c", "d", "a", "b"), folder / "media.tar")
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "ok"}]
    paths = ["a/1.png", "b/2.png", "c/3.png", "1.png", "d/round.png"]
    records = [{"messages": turns, "images": [path]} for path in paths]
    samples, summary = run(write(folder / "r.jsonl", *records))
    assert (len(samples), summary.notes) == (4, {"medium in a tar": 4})
    (line,) = (folder.parent / "out-0/rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["record"] == 4
