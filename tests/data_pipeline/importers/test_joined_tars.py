"""Tars that lie one behind the other in a file, packed ones, headers that nobody can read, and
members whose names have fields."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.importers.archive import Archive
from data_pipeline.shards import ShardError
from tests.data_pipeline.importers.realtime import run, said, write
from tests.samples import write_tar


def tar(folder: Path, *names: str) -> bytes:
    """A tar of pictures with captions, which say their names."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(picture, "PNG")
    members = {f"{name}.png": picture.getvalue() for name in names}
    write_tar(folder / "one.tar", members | {f"{name}.txt": name.encode() for name in names})
    data = (folder / "one.tar").read_bytes()
    (folder / "one.tar").unlink()
    return data


def captions(source: Path) -> tuple[list[str], dict[str, int]]:
    samples, summary = run(source)
    return [said(sample)[-1] for sample in samples], dict(summary.rejected)


def test_joined_tars_are_read_to_the_end(folder: Path) -> None:
    """`cat a.tar b.tar`: tarfile reads the first one."""
    one, two = tar(folder, "0", "1"), tar(folder, "2")
    for name, data, found in (
        ("a.tar", one + two, ["0", "1", "2"]),
        ("b.tar", one + one, ["0", "1", "0", "1"]),
        ("c.tar.gz", gzip.compress(one) + gzip.compress(two), ["0", "1", "2"]),
    ):
        (folder / name).write_bytes(data)
        assert captions(folder / name) == (found, {})
        (folder / name).unlink()


def test_a_link_leads_to_the_member_of_its_own_tar() -> None:
    """Of joined tars that have a name in common: WebDataset counts anew in each."""
    joined = io.BytesIO()
    for content in (b"one", b"two"):
        with tarfile.open(fileobj=joined, mode="w") as one:
            member, link = tarfile.TarInfo("0.txt"), tarfile.TarInfo(f"{content.decode()}.txt")
            member.size, link.type, link.linkname = 3, tarfile.LNKTYPE, "0.txt"
            one.addfile(member, io.BytesIO(content))
            one.addfile(link)
    archive = Archive(joined, None)
    assert {sample.key: archive.read(sample.found["txt"]) for sample in archive.samples[1::2]} == {
        "one": b"one",
        "two": b"two",
    }


def test_a_header_that_cannot_be_read_is_not_the_end(folder: Path) -> None:
    data = bytearray(tar(folder, "0", "1"))
    (folder / "a.tar").write_bytes(data + b"something else" * 100)
    assert captions(folder / "a.tar") == (["0", "1"], {"damaged_shard": 1})
    second = data.index(b"1.png")
    data[second + 148 : second + 156] = b"\xff" * 8  # its checksum
    (folder / "a.tar").write_bytes(data)
    found, rejected = captions(folder / "a.tar")
    assert found == []
    assert rejected["damaged_shard"] == 1
    last = sorted(folder.parent.glob("out-*/rejected.jsonl"))[-1].read_text().splitlines()[-1]
    assert f"byte {second} is not the header of a member" in json.loads(last)["detail"]


def test_media_in_joined_tars_are_found(folder: Path) -> None:
    (folder / "media.tar").write_bytes(tar(folder, "0") + tar(folder, "1"))
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "ok"}]
    records = [{"messages": turns, "images": [f"{n}.png"]} for n in (1, 0)]
    samples, summary = run(write(folder / "r.jsonl", *records))
    assert (len(samples), summary.notes) == (2, {"medium in a tar": 2})


@pytest.mark.parametrize("name", ["photos.tar.gz", "photos.zip"])
def test_media_in_archives_that_are_not_searched_are_told(folder: Path, name: str) -> None:
    """Packed media beside records are no shards, and each record says which to unpack."""
    write_tar(folder / "plain.tar", {"photos/1.jpg": b"a picture"})
    packed = gzip.compress((folder / "plain.tar").read_bytes())
    (folder / "plain.tar").unlink()
    (folder / name).write_bytes(packed)
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "x"}]
    write(folder / "r.jsonl", {"messages": turns, "images": ["photos/1.jpg"]})
    _, summary = run(folder)
    assert summary.rejected == {"missing_file": 1}
    (line,) = (folder.parent / "out-0/rejected.jsonl").read_text().splitlines()
    assert f"{name} is not searched: unpack it" in line
    if name.endswith(".gz"):
        with pytest.raises(ShardError, match=f"unpack it .tar -xf .*{name}"):
            run(folder / "r.jsonl", media_dir=str(folder / name))


def test_packed_shards_beside_a_file_about_them_are_shards(folder: Path) -> None:
    write_tar(folder / "plain.tar", {"1.txt": b"one", "2.txt": b"two"})
    (folder / "s.tar.gz").write_bytes(gzip.compress((folder / "plain.tar").read_bytes()))
    (folder / "plain.tar").unlink()
    (folder / "info.json").write_text('{"version": 1}')
    samples, _ = run(folder)
    assert [said(sample)[-1] for sample in samples] == ["one", "two"]


def test_our_own_samples_name_their_members_in_any_letter_case(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / "1.jpg")
    data = (folder / "1.jpg").read_bytes()
    turns = [{"role": "user", "content": "<|image|>?"}, {"role": "assistant", "content": "x"}]
    for name, file in (("1.0.JPG", "0.JPG"), ("1.0.jpg", "0.JPG"), ("1.0.Jpg", "1.0.JPG")):
        record = {"messages": turns, "media": [{"type": "image", "file": file}]}
        write_tar(folder / "s.tar", {"1.json": json.dumps(record).encode(), name: data})
        (sample,), _ = run(folder / "s.tar")
        assert sample["members"] == {"0.jpg": data}


def test_members_with_and_without_a_dot_slash_belong_together(folder: Path) -> None:
    data = tar(folder, "1", "2")
    with tarfile.open(folder / "s.tar", "w") as out, tarfile.open(fileobj=io.BytesIO(data)) as old:
        for member in old:
            inside = old.extractfile(member)
            member.name = member.name if member.name.endswith(".txt") else f"./{member.name}"
            out.addfile(member, inside)
    samples, summary = run(folder / "s.tar")
    assert not summary.rejected
    assert [said(sample)[-1] for sample in samples] == ["1", "2"]


def test_members_whose_names_have_fields_belong_together(folder: Path) -> None:
    """`KEY.input.jpg`, `KEY.output.txt`, as webdataset's examples have them; were rejected."""
    picture = tar(folder, "0")
    members: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(picture)) as one:
        png = one.extractfile("0.png").read()  # type: ignore[union-attr]
    for key in ("s0", "s1"):
        members |= {f"{key}.input.png": png, f"{key}.output.txt": key.encode()}
    write_tar(folder / "fields.tar", members)
    assert captions(folder / "fields.tar") == (["s0", "s1"], {})
    # Nobody else's names are like these: they may be keys with dots.
    write_tar(folder / "dots.tar", {"a.001.png": png, "a.002.txt": b"of another"})
    assert captions(folder / "dots.tar")[0] == []
    # Two texts: nobody knows which is meant.
    twice = members | {f"{key}.more.txt": b"x" for key in ("s0", "s1")}
    write_tar(folder / "twice.tar", twice)
    assert captions(folder / "twice.tar")[0] == []


def test_the_sound_beside_a_video_is_left_out_and_counted(folder: Path) -> None:
    """video2dataset writes it as a member of its own; the video was rejected with it."""
    clip = (folder / "a.mp4").read_bytes()
    write_tar(
        folder / "v.tar",
        {"0.mp4": clip, "0.txt": b"x", "0.m4a": b"s", "1.txt": b"y", "1.m4a": b"s"},
    )
    samples, summary = run(folder / "v.tar")
    assert [said(sample)[-1] for sample in samples] == ["x"]
    assert summary.notes == {"unused member .m4a": 1}
    assert summary.rejected == {"unknown_media": 1}


def test_questions_of_shards_are_read_as_those_of_files(folder: Path) -> None:
    clip = (folder / "a.mp4").read_bytes()
    records = ({"QA": [{"q": "x", "a": "y"}]}, {"input": "x", "output": "y"},
               {"question": "x", "answer": "B", "A": "1", "B": "2"})  # fmt: skip
    members: dict[str, bytes] = {}
    for key, record in enumerate(records):
        members |= {f"{key}.mp4": clip, f"{key}.json": json.dumps(record).encode()}
    write_tar(folder / "q.tar", members)
    samples, summary = run(folder / "q.tar")
    assert [said(sample) for sample in samples] == [["<|video|>x", "y"]] * 2
    assert summary.rejected == {"bad_schema": 1}
