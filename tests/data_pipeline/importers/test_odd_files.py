"""What files are like besides what their forms say: packed, empty, linked, spelt otherwise."""

from __future__ import annotations

import base64
import gzip
import io
import json
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from data_pipeline.build import build_shards
from data_pipeline.importers.forms import SourceOptions, open_source
from data_pipeline.importers.records import read_records
from data_pipeline.schema import SampleError
from data_pipeline.shards import ShardError
from tests.data_pipeline.importers.realtime import FRAME, SILENCE, WATCHED, run, said, write
from tests.samples import write_tar


def chat(answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def streamo(**fields: Any) -> dict[str, Any]:
    return {
        "video_path": "a.mp4",
        "question": [{"content": "What?", "time": "3"}],
        "response": [{"content": "A cup.", "st_time": 5.0, "end_time": 6.0, "time": ""}],
    } | fields


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def zstd(data: bytes) -> bytes:
    packed: bytes = pyarrow.compress(data, "zstd", asbytes=True)
    return packed


def answers(source: Path) -> list[str]:
    return [said(sample)[-1] for sample in run(source)[0]]


def test_packed_files_of_records_are_read_as_what_is_in_them(tmp_path: Path) -> None:
    two, table = lines(chat("one"), chat("two")), b"image,caption\na.png,one\n"
    by_ids = json.dumps({"videos": {"x": {"n": 1}, "y": {"n": 2}}}, indent=1).encode()
    for name, data, count in (
        ("a.jsonl.gz", gzip.compress(two), 2),
        ("b.jsonl.zst", zstd(two), 2),
        ("c.jsonl", gzip.compress(two), 2),  # only its name is plain
        ("d.json.zst", zstd(b"\xef\xbb\xbf" + json.dumps([chat("one")]).encode()), 1),
        ("e.json.gz", gzip.compress(by_ids), 2),
        ("f.csv.gz", gzip.compress(table), 1),
        ("g.tsv.zst", zstd(b"\xef\xbb\xbf" + table.replace(b",", b"\t")), 1),
        ("h.ndjson", two, 2),
    ):
        (tmp_path / name).write_bytes(data)
        found = [record.value for record in read_records(str(tmp_path / name))]
        assert len(found) == count, name
        assert all(isinstance(record, dict) and set(record) & {"messages", "n", "caption"}
                   for record in found), name  # fmt: skip
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(two * 5000)[:-200])
    *found, last = (r.value for r in read_records(str(tmp_path / "cut.jsonl.gz")))
    assert found[0] == chat("one")
    assert isinstance(last, SampleError)
    assert last.reason == "unreadable_file"


def test_a_file_that_is_none_costs_itself_and_a_file_that_is_not_read_is_named(
    tmp_path: Path,
) -> None:
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    for made in (folder / "deep", elsewhere):
        made.mkdir(parents=True)
    write(folder / "good.jsonl", chat("one"))
    write(elsewhere / "linked.jsonl", chat("two"))
    (folder / "empty.json").write_bytes(b"")
    (folder / "config.json").write_text('{"version": 1}')
    (folder / "gone.jsonl").symlink_to("nowhere.jsonl")
    (folder / "alone.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nhello\n")
    (folder / "deep" / "round").symlink_to(folder)
    (folder / "deep" / "more").symlink_to(elsewhere)
    (samples, summary) = run(folder)
    assert [said(sample)[-1] for sample in samples] == ["one"]
    assert summary.rejected == {"empty_file": 1, "unreadable_file": 2}
    opened = open_source(str(folder), SourceOptions(), tmp_path / "out")
    assert opened.unread == (f"{folder}/alone.srt", f"{folder}/deep/more/linked.jsonl")

    (folder / "good.jsonl").unlink()  # what is on top has no form: what is deeper is read
    samples, summary = run(folder)
    assert [said(sample)[-1] for sample in samples] == ["two"]
    for path in (elsewhere / "linked.jsonl", folder / "empty.json"):
        path.unlink()
    with pytest.raises(ShardError, match="version: not a known form"):
        run(folder)


def test_rows_of_tables_that_hold_more_than_texts(folder: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(picture, "JPEG")
    (folder / "a.jpg").write_bytes(picture.getvalue())
    rows = [streamo(question=json.dumps([{"content": "What?", "time": 3}]),
                    response=json.dumps(streamo()["response"])), ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "events.parquet")
    (sample,), _ = run(folder / "events.parquet")
    assert said(sample)[2:] == ["What?", FRAME + WATCHED * 3 + SILENCE + FRAME + "A cup."
                                + WATCHED * 3 + SILENCE]  # fmt: skip
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "Red."}]
    for column, value in (("image", picture.getvalue()), ("images", [picture.getvalue()])):
        table = pyarrow.table({column: [value], "messages": [turns]})
        pyarrow.parquet.write_table(table, folder / f"{column}.parquet")
        (sample,), _ = run(folder / f"{column}.parquet")
        assert list(sample["members"].values()) == [picture.getvalue()]
    prompts = [{"prompt": "Call it.", "response": '[{"name": "f"}]'}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(prompts), folder / "calls.parquet")
    assert answers(folder / "calls.parquet") == ['[{"name": "f"}]']

    (folder / "latin.csv").write_bytes("image;caption\na.jpg;caf\xe9\na.jpg;ok\n".encode("latin1"))
    samples, summary = run(folder / "latin.csv")
    assert [said(sample)[-1] for sample in samples] == ["ok"]
    assert summary.rejected == {"bad_text": 1}
    (folder / "twice.csv").write_text("image,caption,caption\na.jpg,x,y\n")
    with pytest.raises(ShardError, match="two columns are called 'caption'"):
        run(folder / "twice.csv")


def test_transcripts_as_their_programs_write_them(folder: Path) -> None:
    def read(name: str, text: str) -> tuple[str, dict[str, int]]:
        (folder / name).write_text(text, encoding="utf-8")
        (sample,), summary = run(folder)
        (folder / name).unlink()
        notes = {n: c for n, c in summary.notes.items() if not n.startswith("clip cut out")}
        return said(sample)[-1].replace(SILENCE, "").replace(FRAME, "|"), notes

    styled = (
        "\ufeffWEBVTT - x\n\nSTYLE\n::cue { color: red }\n\nNOTE not\na cue\n\nintro\n"
        "00:01.000 --> 00:02.000 align:start\n<v Ann>black &amp; <c.w>white</c>\n"
    )
    assert read("a.vtt", styled) == ("|||black & white|", {})
    negative = (
        "1\n-00:00:01,000 --> 00:00:01,000\nearly\n\n2\n00:00:02,000 --> 00:00:03,000\ngood\n"
    )
    assert read("a.srt", negative) == ("|||good|", {"word with a bad time, left out": 1})
    for words in (
        {"transcription": [{"offsets": {"from": 1000, "to": 2000}, "text": " good"}]},
        {"text": "good", "chunks": [{"timestamp": [2.0, None], "text": " good"}]},
    ):
        assert read("a.json", json.dumps(words)) == ("|||good|", {})
    aligned = [{"word": "in", "start": 1.0, "end": 2.0}, {"word": "2014"}]  # WhisperX
    segments = {"segments": [{"start": 1.0, "end": 2.0, "text": "in 2014", "words": aligned}]}
    assert read("a.json", json.dumps(segments)) == (
        "|||in 2014|", {"word without a time, said with the one before": 1},
    )  # fmt: skip
    assert "A cup." in read("a.json", json.dumps(streamo()))[0]  # a record of another form


def test_names_are_found_however_their_accents_are_written(folder: Path) -> None:
    one, two = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    (folder / f"{two}.mp4").write_bytes((folder / "a.mp4").read_bytes())
    samples, summary = run(write(folder / "r.jsonl", streamo(video_path=f"{one}.mp4")))
    assert (len(samples), summary.rejected) == (1, {})
    (folder / "r.jsonl").unlink()
    (folder / f"{one}.txt").write_text("A cup.")
    assert answers(folder) == ["A cup."]
    (folder / f"{one}.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nhello you\n")
    assert "hello you" in answers(folder)[0]


def test_a_tar_of_media_beside_records_is_theirs(folder: Path) -> None:
    clip = (folder / "a.mp4").read_bytes()
    with tarfile.open(folder / "media.tar", "w") as tar:
        for name in ("clips/one.mp4", "clips/two.mp4", "other/two.mp4"):
            member = tarfile.TarInfo(name)
            member.size = len(clip)
            tar.addfile(member, io.BytesIO(clip))
    write(folder / "r.jsonl", streamo(video_path="one.mp4"), streamo(video_path="two.mp4"))
    samples, summary = run(folder)
    assert len(samples) == 1
    assert summary.rejected == {"missing_file": 1}, "of two that end alike neither is taken"
    assert open_source(str(folder), SourceOptions(), folder / "out").unread == ()


def picture(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(out, "JPEG")
    return out.getvalue()


def shown(source: Path) -> tuple[list[bytes], Any]:
    """The media of the samples, and the summary."""
    samples, summary = run(source)
    return [data for sample in samples for data in sample["members"].values()], summary


def asked(**fields: Any) -> dict[str, Any]:
    return chat("ok") | {"messages": [{"role": "user", "content": "<image>?"}, *ok()]} | fields


def ok() -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": "ok"}]


def test_pictures_named_by_urls_or_held_in_the_record(folder: Path) -> None:
    red, text = picture("red"), base64.b64encode(picture("red")).decode()
    (folder / "my pic.jpg").write_bytes(red)
    names = [
        f"data:image/jpeg;base64,{text}",
        text,
        f"file://{folder}/my%20pic.jpg",
        "my%20pic.jpg",
        {"image": "my pic.jpg"},
    ]
    parts = [{"type": "image_url", "image_url": {"url": names[0]}}, {"type": "text", "text": "?"}]
    records = [asked(images=[name]) for name in names]
    records += [{"messages": [{"role": "user", "content": parts}, *ok()]}]
    media, summary = shown(write(folder / "r.jsonl", *records))
    assert (media, summary.rejected) == ([red] * 6, {})
    assert summary.notes == {"medium found by its path without %XX": 1}

    broken = write(folder / "r.jsonl", asked(images=["data:image/png;base64,@@"]), asked(image="x"))
    _, summary = run(broken)
    assert summary.rejected == {"bad_schema": 1, "missing_file": 1}


def test_what_is_said_of_a_medium_and_not_used_is_counted(folder: Path) -> None:
    (folder / "a.jpg").write_bytes(picture("red"))
    part = {"type": "image", "image": "a.jpg", "resized_height": 4, "text": None}
    content: list[dict[str, Any]] = [part, {"type": "text", "text": "?", "image": None}]
    records = [
        {"messages": [{"role": "user", "content": content}, *ok()]},
        asked(images=[{"path": "a.jpg", "start_time": 1}]),
        {"messages": [{"role": "user", "content": [content[1] | {"image": "a.jpg"}]}, *ok()]},
    ]
    media, summary = shown(write(folder / "r.jsonl", *records))
    assert len(media) == 2
    assert summary.notes == {
        "unused field images[].resized_height": 1,
        "unused field images[].start_time": 1,
    }
    assert summary.rejected == {"bad_schema": 1}


def test_errors_of_media_name_the_medium(folder: Path) -> None:
    (folder / "page.jpg").write_text("<html>")
    (folder / "pointer.jpg").write_text("version https://git-lfs.github.com/spec/v1\n")
    (folder / "page.mp4").write_text("<html>")
    records = [asked(images=["page.jpg"]), asked(images=["pointer.jpg"])]
    records += [asked(videos=["page.mp4"]), asked(images=["page.jpg", "page.jpg"])]
    source = write(folder / "r.jsonl", *records)
    run(source)
    (rejected,) = folder.parent.glob("out-*/rejected.jsonl")
    details = [json.loads(line)["detail"] for line in rejected.read_text().splitlines()]
    assert details[0].endswith("page.jpg: 6 bytes: an HTML page")
    assert "pointer.jpg is a pointer of Git LFS" in details[1]
    assert "page.mp4: 6 bytes" in details[2]
    assert details[3] == "no mark for 1 of the media: write <image> in a text where each belongs"


def test_files_of_other_kinds_are_told_what_is_read(tmp_path: Path) -> None:
    for name, data, says in (
        ("a.xlsx", b"PK\3\4", "records are read from .csv, .json"),
        ("a.tar.zst", zstd(b"\xff" * 2000), "convert or unpack it"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ShardError, match=says) as caught:
            open_source(str(tmp_path / name), SourceOptions(), tmp_path / "out")
        assert name in str(caught.value)
    table = pyarrow.table({"image": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "none.parquet")
    assert list(read_records(str(tmp_path / "none.parquet"))) == []


def test_a_tar_that_is_compressed_by_its_first_bytes_alone(folder: Path) -> None:
    red = picture("red")
    with tarfile.open(folder / "packed.tar", "w:gz") as tar:
        for name, data in (("a.jpg", red), ("a.txt", b"Red.")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert shown(folder / "packed.tar")[0] == [red]


def test_parts_of_a_set_that_cannot_be_read_are_named(folder: Path) -> None:
    write(folder / "good.jsonl", chat("one"))
    for name in ("b.tar.zst", "c.zip", "mix.yaml", "readme.md"):
        (folder / name).write_bytes(b"")
    unread = open_source(str(folder), SourceOptions(), folder / "out").unread
    assert unread == tuple(f"{folder}/{name}" for name in ("b.tar.zst", "c.zip", "mix.yaml"))


@pytest.mark.parametrize("whole", [False, True])  # a stream, as datasets write it, or a file
def test_what_datasets_save_to_disk(folder: Path, whole: bool) -> None:
    """By `save_to_disk` of a DatasetDict: its split has a dataset_info.json, which is its own."""
    split, red = folder / "set" / "train", picture("red")
    split.mkdir(parents=True)
    (folder / "red.png").write_bytes(red)
    images = [{"bytes": red, "path": None}, {"bytes": None, "path": str(folder / "red.png")}, None]
    rows = [{"image": images[i % 3], "text": f"row {i}"} for i in range(150)]
    table = pyarrow.Table.from_pylist(rows)
    opened = pyarrow.ipc.new_file if whole else pyarrow.ipc.new_stream
    with opened(str(split / "data-00000-of-00001.arrow"), table.schema) as out:
        out.write_table(table, max_chunksize=70)
    about = {"dataset_info.json": {"features": {"text": {"dtype": "string"}}, "citation": ""},
             "state.json": {"_split": "train"}}  # fmt: skip
    for name, value in about.items():
        (split / name).write_text(json.dumps(value))
    (split.parent / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert open_source(str(split.parent), SourceOptions(), folder / "out").unread == ()
    for source in (split.parent, split, split / "data-00000-of-00001.arrow"):
        media, summary = shown(source)
        assert media == [red] * 100
        assert summary.rejected == {"missing_file": 50}


def test_a_dataset_info_that_names_files_is_llama_factorys_beside_arrow_files(folder: Path) -> None:
    source = folder / "set"
    (source / "cache").mkdir(parents=True)
    info = {
        "talks": {"file_name": "t.json", "formatting": "sharegpt", "columns": {"messages": "said"}},
        "texts": {"file_name": "x.json", "columns": {"prompt": "p"}},
    }
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    records = {"t": [{"said": turns}], "x": [{"p": "b", "label": False}]}
    for name, value in ({"dataset_info": info, "cache/dataset_info": {}} | records).items():
        (source / f"{name}.json").write_text(json.dumps(value))
    for place in ("cache", "."):
        (source / place / "x.arrow").write_bytes(b"")
        samples, summary = run(source)
        assert sorted(said(sample)[-1] for sample in samples) == ["a", "b"]
        assert summary.notes == {"unused field label": 1}
        assert open_source(str(source), SourceOptions(), folder / "out").form == "llamafactory"


def test_a_medium_of_another_folder_is_not_taken_for_a_missing_one(folder: Path) -> None:
    data = (folder / "a.mp4").read_bytes()
    for tar, names in (("c.tar", ["sets/a/1.mp4", "x/2.mp4"]), ("d.tar", ["x/2.mp4", "x/3.mp4"])):
        with tarfile.open(folder / tar, "w") as archive:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size = len(data) - (tar == "d.tar")
                archive.addfile(member, io.BytesIO(data))
    paths = [
        "a/1.mp4",
        "b/1.mp4",
        "/home/me/b/1.mp4",
        "/home/me/a/1.mp4",
        "1.mp4",
        "x/2.mp4",
        "b/a/1.mp4",
    ]
    records = [streamo(video_path=path, video_name="") for path in paths]
    out = folder.parent / "out"
    summary = build_shards(write(folder / "raw.jsonl", *records), out)
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [(line["record"], line["reason"]) for line in lines] == [
        (1, "missing_file"), (2, "missing_file"), (5, "ambiguous_media"),
        (6, "missing_file"),
    ]  # fmt: skip
    assert summary.notes == {"medium in a tar": 3}


def test_members_of_odd_names_and_texts(folder: Path) -> None:
    red = picture("red")
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "r"}]
    members = {
        "1.jpg": red, "1.txt": b"one\r\nline", "1.V5.jpg": red, "1.V5.txt": b"half",
        "2.jpg": red, "2.json": json.dumps(turns).encode(), "2.txt": b"kept apart",
        "3.jpg": red, "3.json": b'"a string"',
        "4.jpg": red, "4.txt": b"boxes", "4.json": b'[{"bbox": [0, 1], "category": 2}]',
        "5.jpg": red, "5.caption": b"none", "5.json": b"[]", "6.jpg": red, "6.json": b"[]",
    }  # fmt: skip
    write_tar(folder / "a.tar", members)
    samples, summary = run(folder / "a.tar")
    assert [said(sample)[-1] for sample in samples] == [
        "one\nline", "half", "r", "boxes", "none",
    ]  # fmt: skip
    assert summary.notes == {"unused member .txt": 1, "unused member .json": 2}
    assert summary.rejected == {"bad_schema": 2}
