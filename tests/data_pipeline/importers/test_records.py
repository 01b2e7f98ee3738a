"""Files of records are read the same in small pieces, as parts, and with little memory."""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.importers import records
from data_pipeline.importers.records import read_records
from data_pipeline.importers.share import Share
from data_pipeline.schema import SampleError
from data_pipeline.shards import ShardError

# Each is one record, whose fields have names of lists in which others have their records.
OWN_LISTS: tuple[dict[str, Any], ...] = (
    {"image": "a.jpg", "caption": "x", "annotations": [{"bbox": [1, 2, 3, 4]}]},
    {"instruction": "x", "output": "y", "images": ["a.jpg"], "annotations": ["z"]},
    {"instruction": "x", "output": "y", "data": [1]},
    {"text": "x", "questions": []},
    {"video_uid": "x", "annotations": [{"segment": [0, 1], "sentence": "x"}]},
)
BY_IDS: dict[str, tuple[Any, int]] = {
    "ego4d": (
        {"version": 1, "videos": {f"v{i}": {"n": i, "x": 1.5} for i in range(30)}, "z": 2},
        30,
    ),
    "lists": ({f"v{i}": [{"time": i, "text": "\u00e9"}] for i in range(1500)}, 1500),
    "a record": ({"messages": [{"role": "user", "content": "x"}], "images": ["a"]}, 1),
    "a record of scalars": ({"a": {"b": 1}, "c": 3}, 1),
}


def values(path: Path) -> list[Any]:
    return [record.value for record in read_records(str(path))]


def written(path: Path, value: Any) -> list[Path]:
    """On a line, on many, and with a byte order mark."""
    texts = [json.dumps(value), json.dumps(value, indent=1), "\ufeff" + json.dumps(value, indent=1)]
    paths = [path.with_name(f"{number}{path.name}") for number in range(3)]
    for one, text in zip(paths, texts, strict=True):
        one.write_text(text)
    return paths


@pytest.mark.parametrize("name", BY_IDS)
def test_large_objects_of_records_by_ids_are_read_as_small_ones(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value, count = BY_IDS[name]
    for path in written(tmp_path / "a.json", value):
        small = values(path)
        with monkeypatch.context() as patch:
            patch.setattr(records, "_LARGE", 8)
            patch.setattr(records, "_CHUNK", 16)
            assert values(path) == small
        assert len(small) == count


@pytest.mark.parametrize("record", OWN_LISTS)
def test_a_record_with_lists_of_its_own_is_one(record: dict[str, Any], tmp_path: Path) -> None:
    for path in written(tmp_path / "a.json", record):
        assert values(path) == [record]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lines_of_json_in_a_text_file_are_no_table(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('{"text": "a, b"}\n{"text": "c"}\n', encoding)
    assert values(tmp_path / "a.txt") == [{"text": "a, b"}, {"text": "c"}]


@pytest.mark.parametrize("large", [False, True])
def test_a_list_of_records_under_a_name_is_told(
    large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `{"data": [...]}` and `{"train": [...], "test": [...]}`; nobody knows which are meant."""
    if large:
        monkeypatch.setattr(records, "_LARGE", 8)
    for path in written(tmp_path / "a.json", {"train": [{"messages": []}], "test": []}):
        with pytest.raises(ShardError, match=r"a\.json: train holds a list of records"):
            values(path)
    narrated = [{"text": "no time"}, {"time": 1, "text": "x"}]
    timed: dict[str, list[Any]] = {"a": narrated, "b": [{"start": 1, "end": 2, "text": "x"}]}
    for path in written(tmp_path / "b.json", {"videos": timed | {"c": [{"text": "x"}]}}):
        *found, last = values(path)
        assert found == [{"video_uid": name, "narrations": timed[name]} for name in "ab"]
        assert isinstance(last, SampleError)
        assert "c holds a list of records" in last.detail
        assert "jq '.videos[\"c\"]' FILE" in last.detail


def test_a_large_object_that_is_cut_off_gives_what_is_before_the_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_LARGE", 8)
    whole = json.dumps({f"v{i}": {"n": i} for i in range(100)})
    (tmp_path / "a.json").write_text(whole[:-30])
    *read, damage = values(tmp_path / "a.json")
    assert read == [{"video_uid": f"v{i}", "n": i} for i in range(len(read))]
    assert len(read) > 90
    assert isinstance(damage, SampleError)
    assert f"after {len(read)} records" in damage.detail
    (tmp_path / "b.json").write_text(whole[:-30].replace('"n": 0', '"n" 0'))
    with pytest.raises(ShardError, match="cannot be read"):
        values(tmp_path / "b.json")


def test_lists_are_read_the_same_in_small_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"messages": [{"role": "user", "content": "\u00e9" * n}]} for n in range(200)]
    monkeypatch.setattr(records, "_CHUNK", 16)
    for path in (*written(tmp_path / "a.json", turns), *written(tmp_path / "a.jsonl", turns)):
        assert values(path) == turns


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_parts_share_out_the_records_of_a_file(suffix: str, tmp_path: Path) -> None:
    rows = [{"text": f"row {n}"} for n in range(1000)]
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, path, row_group_size=70)
    elif suffix == "csv":
        path.write_text("\n".join(["text", *(row["text"] for row in rows)]) + "\n")
    else:
        lines = [json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) if suffix == "jsonl" else f"[{','.join(lines)}]")
    shares = [partial(Share(part, 3).has_record, "a") for part in range(3)]
    parts = [list(read_records(str(path), wanted)) for wanted in shares]
    together = sorted((one for part in parts for one in part), key=lambda one: one.number)
    assert together == list(read_records(str(path)))
    assert [one.value for one in together] == rows
    assert all(200 < len(part) < 500 for part in parts)


def rows(path: Path) -> list[Any]:
    """The last field of each row, the reason where it has none."""
    values = [record.value for record in read_records(str(path))]
    return [v.detail if isinstance(v, SampleError) else [*v.values()][-1] for v in values]


def test_quotes_in_tables_take_no_rows_away(tmp_path: Path) -> None:
    text = 'image\tcaption\na\t"Hi" she says\nb\t"open\nc\tlast\nd\t"two\nlines"\ne\t"a ""b"""\n'
    (tmp_path / "a.tsv").write_text(text)
    said = ['"Hi" she says', '"open', "last", "two\nlines", 'a "b"']
    assert rows(tmp_path / "a.tsv") == said
    (tmp_path / "a.csv").write_text('image,caption\na,"two\nlines"\nb,"open\nc,x\nd,y\n')
    first, rejected = rows(tmp_path / "a.csv")
    assert (first, rejected[:6]) == ("two\nlines", "line 4")


def test_names_of_columns_have_no_spaces_around_them(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image, caption\na.jpg, red\n")
    (record,) = values(tmp_path / "a.csv")
    assert list(record) == ["image", "caption"]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_turns_stored_as_lists_side_by_side_are_turns(suffix: str, tmp_path: Path) -> None:
    """As Hugging Face's datasets store a sequence of objects."""
    path = tmp_path / f"r{suffix}"
    rows: list[dict[str, Any]] = [
        {"conversations": {"from": ["human", "gpt"], "value": ["What?", "That."]}},
        {"conversations": {"from": ["human", "gpt"], "value": ["What?"]}},
    ]
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole, uneven = [record.value for record in read_records(str(path))]
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    assert whole == {"conversations": turns}
    assert isinstance(uneven, SampleError)
    assert uneven.detail == "conversations: its lists have different lengths"


@pytest.mark.parametrize("pieces", [7, 1 << 16])
def test_lists_that_were_joined_are_read_to_the_end(
    pieces: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`cat a.json b.json`; what else stands behind a list is told."""
    monkeypatch.setattr(records, "_CHUNK", pieces)
    path = tmp_path / "r.json"
    for between in ("", "\n", " \n\n", "\n\ufeff"):
        path.write_text(
            f'[{{"n": 1}}]{between}[{{"n": 2}},\n{{"n": 3}}] [] [{{"n": 4}}]\n \n', encoding="utf-8"
        )
        assert values(path) == [{"n": n} for n in (1, 2, 3, 4)]
    for behind in ('{"n": 2}', "x", "]"):
        path.write_text(f'[{{"n": 1}}]\n{behind}\n')
        one, damage = values(path)
        assert one == {"n": 1}
        assert damage.detail == "after 1 records: more behind the end of the list"
    path.write_text("[]\n")
    assert values(path) == []


def test_damage_of_a_row_group_costs_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    table = pyarrow.table({"n": range(300), "text": [f"{n:064x}" for n in range(300)]})
    pyarrow.parquet.write_table(table, path, row_group_size=100, compression="gzip",
                                use_dictionary=False)  # fmt: skip
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(1)
    data = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[middle : middle + 40] = bytes(40)
    path.write_bytes(data)
    found = values(path)
    assert [value["n"] for value in found[:100] + found[200:]] == [*range(100), *range(200, 300)]
    assert {value.reason for value in found[100:200]} == {"unreadable_file"}
    assert found[100].detail.startswith(f"{path}: row group 1: ")


def test_arrow_streams_that_were_joined_or_cut_off(tmp_path: Path) -> None:
    streams = []
    for numbers in ([1, 2], [3]):
        made = pyarrow.BufferOutputStream()
        table = pyarrow.table({"n": numbers})
        with pyarrow.ipc.new_stream(made, table.schema) as writer:
            writer.write_table(table)
        streams.append(made.getvalue().to_pybytes())
    path = tmp_path / "r.arrow"
    path.write_bytes(b"".join(streams))
    assert values(path) == [{"n": 1}, {"n": 2}, {"n": 3}]
    path.write_bytes(streams[0] + streams[1][: len(streams[1]) // 2])
    *whole, damage = values(path)
    assert whole == [{"n": 1}, {"n": 2}]
    assert (damage.reason, damage.detail.partition(": ")[0]) == ("unreadable_file", str(path))


def test_a_text_of_parquet_that_is_not_utf_8_costs_its_row(tmp_path: Path) -> None:
    texts = pyarrow.array([b"one", b"caf\xe9", b"three"], pyarrow.binary())
    wrong = pyarrow.StringArray.from_buffers(3, texts.buffers()[1], texts.buffers()[2])
    pyarrow.parquet.write_table(pyarrow.table({"text": wrong}), tmp_path / "r.parquet")
    one, two, three = values(tmp_path / "r.parquet")
    assert (one, three) == ({"text": "one"}, {"text": "three"})
    assert (two.reason, two.detail) == ("bad_text", "byte 3 of a text is not UTF-8")


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_packed_file_that_is_cut_off_gives_what_is_before_the_cut(
    kind: str, tmp_path: Path
) -> None:
    lines = b"".join(b'{"n": %d, "text": "%x"}\n' % (n, hash(n * 7919.5)) for n in range(40_000))
    path = tmp_path / ("r.jsonl.gz" if kind == "gzip" else "r.jsonl.zst")
    packed = pyarrow.Codec(kind).compress(lines, asbytes=True)
    path.write_bytes(packed[: len(packed) * 3 // 4])
    *whole, damage = values(path)
    numbers = [value["n"] for value in whole if isinstance(value, dict)]
    assert numbers == [*range(len(numbers))]
    assert len(numbers) > 20_000
    assert damage.reason == "unreadable_file"


def test_a_key_that_stands_twice_with_two_values_costs_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's json takes the last one: of two pictures, two captions, two narrations of a video
    one was lost without a word."""
    lines = ['{"n": 1}', '{"a": [{"n": 2, "n": 3}]}', '{"n": 4, "n": 4}', '{"n": 5}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.json").write_text(f"[{','.join(lines)}]")
    for name in ("a.jsonl", "a.json"):
        first, twice, same, last = values(tmp_path / name)
        assert [first, same, last] == [{"n": 1}, {"n": 4}, {"n": 5}]
        assert twice.reason == "bad_json"
        assert twice.detail == "the key 'n' stands twice in an object: keep one"
    (tmp_path / "ids.json").write_text('{"v": [{"time": 1}], "v": [{"time": 2}]}')
    with pytest.raises(ShardError, match=r"ids\.json cannot be read: the key 'v' stands twice"):
        values(tmp_path / "ids.json")
    monkeypatch.setattr(records, "_LARGE", 8)
    assert len(values(tmp_path / "ids.json")) == 2  # read entry by entry: none is lost


@pytest.mark.parametrize("pieces", [7, 1 << 16])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".jsonl.gz"])
def test_objects_over_several_lines_each_are_records(
    pieces: int, suffix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As `jq '.[]'` writes them."""
    monkeypatch.setattr(records, "_CHUNK", pieces)
    wanted = [{"text": "a}\n{"}, {"messages": [{"role": "user", "content": "\u00e9"}]}, {"n": 3}]
    text = "".join(json.dumps(record, indent=2) + "\n" for record in wanted)
    for end, damaged in (("", False), (text[:-9], True)):
        data = (text + end).encode()
        path = tmp_path / f"a{suffix}"
        path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
        found = values(path)
        assert found[:3] == wanted
        assert len(found) == (6 if damaged else 3)
        if damaged:
            assert found[3:5] == wanted[:2]
            assert found[5].reason == "bad_json"
            assert found[5].detail.startswith("after 5 records: ")


def test_a_comma_behind_each_line_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"n": 1},\n{"n": 2},  \n{"n": 3},,\n{"n": 4}\n')
    one, two, bad, four = values(tmp_path / "a.jsonl")
    assert [one, two, four] == [{"n": 1}, {"n": 2}, {"n": 4}]
    assert bad.reason == "bad_json"


@pytest.mark.parametrize(
    "first", ["a red square\thttp://x.org/1.jpg", "1.jpg\ta red square", "v.mp4\tx"]
)
def test_a_table_without_names_of_columns_is_told(first: str, tmp_path: Path) -> None:
    """CC3M's is one: its first row would be the names, and lost."""
    for path, text in ((tmp_path / "a.tsv", first), (tmp_path / "a.csv", first.replace("\t", ","))):
        path.write_text(f"{text}\n{text}\n")
        with pytest.raises(ShardError, match=r"the first line has '.*', and no names of columns"):
            values(path)


def test_a_columns_name_may_end_like_typescript(tmp_path: Path) -> None:
    """As of nested records that pandas has unfolded: `event.ts`, its time."""
    (tmp_path / "a.csv").write_text("text,event.ts\na,3\n")
    assert values(tmp_path / "a.csv") == [{"text": "a", "event.ts": "3"}]
