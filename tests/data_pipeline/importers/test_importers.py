"""Every form of source becomes the samples that one would write by hand."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from data_pipeline.build import BuildOptions, Summary, build_shards
from data_pipeline.importers.forms import SourceOptions
from data_pipeline.shards import ShardError
from tests.samples import imported, write_tar


def picture(path: Path, color: str = "red", size: tuple[int, int] = (12, 8)) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path.read_bytes()


def video(path: Path, seconds: int = 3) -> bytes:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for index in range(4 * seconds):
            pixels = np.full((16, 32, 3), 20 * (index % 12), np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    return path.read_bytes()


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def rejected(out: Path) -> dict[str, str]:
    lines = (out / "rejected.jsonl").read_text().splitlines()
    return {line["key"]: line["reason"] for line in map(json.loads, lines)}


def run(source: Path, out: Path, **how: Any) -> Summary:
    return build_shards(source, out, BuildOptions(source=SourceOptions(**how)))


def said(sample: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in sample["messages"]]


# Long: one dataset_info.json with all that it can say, and what is to come of it.
def test_dataset_info_maps_columns_tags_and_roles(tmp_path: Path) -> None:
    source, out = tmp_path / "data", tmp_path / "out"
    red, clip = picture(source / "pics/red.png"), video(source / "clip.mp4")
    info = {
        "tools": {
            "file_name": "tools.json",
            "formatting": "sharegpt",
            "columns": {"messages": "talk", "system": "sys", "tools": "tools"},
            "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "me"},
        },
        "looks": {
            "file_name": "looks.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "images": "pics", "videos": "clips"},
            "tags": {
                "role_tag": "role", "content_tag": "content", "user_tag": "user",
                "assistant_tag": "assistant", "system_tag": "system",
            },
        },
        "orders": {
            "file_name": "orders.json",
            "columns": {
                "prompt": "q", "query": "more", "response": "a", "system": "s",
                "history": "before", "images": "images",
            },
            "num_samples": 2,
        },
        "words": {"file_name": "words.jsonl", "columns": {"prompt": "text"}},
        "prefer": {"file_name": "p.json", "ranking": True, "columns": {"chosen": "c"}},
        "far": {"hf_hub_url": "someone/something"},
    }  # fmt: skip
    (source / "dataset_info.json").write_text(json.dumps(info))
    talk = [
        {"who": "me", "what": "Is it raining in <video> Rome?"},
        {"who": "function_call", "what": '{"name": "rain"}'},
        {"who": "observation", "what": "no"},
        {"who": "gpt", "what": "It is not."},
    ]
    (source / "tools.json").write_text(
        json.dumps([
            {"talk": talk, "sys": "Be brief.", "tools": "[rain]"},
            {"talk": [{"who": "user", "what": "?"}]},
        ])
    )  # fmt: skip
    marks = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "<video>or <image>?"},
        {"role": "assistant", "content": "Both"},
    ]
    write_jsonl(source / "looks.jsonl", [
        {"messages": marks, "pics": ["pics/red.png"], "clips": "clip.mp4"},
        {"messages": marks, "pics": ["pics/red.png"]},
    ])  # fmt: skip
    order = {"q": "<image>Name", "more": "the color", "a": "Red", "s": "Sys",
             "before": [["Hello", "Hi"]], "images": ["pics/red.png"]}  # fmt: skip
    (source / "orders.json").write_text(
        json.dumps([order, {"q": "2+2", "more": "", "a": "4"}, order])
    )
    write_jsonl(source / "words.jsonl", [{"text": "Once upon a time."}])

    summary = run(source, out)
    assert summary.imported == {"text": 3, "video": 1, "image": 1}
    assert rejected(out) == {
        "tools-000001": "bad_schema",  # this data set calls its user `me`
        "looks-000001": "mark_media_mismatch",
        "prefer": "unsupported_data_set",
        "far": "unsupported_data_set",
    }
    samples = imported(out)
    assert said(samples["tools-000000"]) == [
        ("system", "Be brief.\n\n[rain]"),
        ("user", "Is it raining in <video> Rome?"),  # no videos: it is just text
        ("assistant", '{"name": "rain"}'),
        ("user", "no"),
        ("assistant", "It is not."),
    ]
    looks = samples["looks-000000"]
    assert said(looks)[1] == ("user", "<|video|>or <|image|>?")
    assert [medium["file"] for medium in looks["media"]] == ["0.mp4", "1.png"]
    assert looks["members"] == {"0.mp4": clip, "1.png": red}
    assert said(samples["orders-000000"]) == [
        ("system", "Sys"),
        ("user", "Hello"),
        ("assistant", "Hi"),
        ("user", "<|image|>Name\nthe color"),
        ("assistant", "Red"),
    ]
    assert said(samples["orders-000001"]) == [("user", "2+2"), ("assistant", "4")]
    assert said(samples["words-000000"]) == [("user", ""), ("assistant", "Once upon a time.")]
    assert samples["words-000000"]["kind"] == "caption"

    only = run(source, tmp_path / "only", datasets=("words",))
    assert only.records == 1
    with pytest.raises(ShardError, match="no data set wrods; it has tools, looks"):
        run(source, tmp_path / "typo", datasets=("wrods",))


def test_records_without_a_dataset_info_say_themselves_what_they_are(tmp_path: Path) -> None:
    source, out = tmp_path / "data", tmp_path / "out"
    picture(source / "red.png")
    human = {"from": "human", "value": "<image>"}
    gpt = {"from": "gpt", "value": "Red"}
    write_jsonl(source / "a.jsonl", [
        {"conversations": [human, gpt], "images": ["red.png"]},
        {"conversations": [{"from": "narrator", "value": ""}, gpt]},
        {"conversations": [human | {"value": ["x"]}, gpt]},
        {"other": 1},
    ])  # fmt: skip
    with (source / "a.jsonl").open("a") as file:
        file.write('{"conversations": [\n')
    (source / "b.json").write_text(json.dumps([{"instruction": "1+1", "output": "2"}]))
    write_jsonl(source / "c.jsonl", [{"text": "<image> is a tag of nothing"}, {"text": " "}])
    summary = run(source, out)
    assert summary.imported == {"image": 1, "text": 2}
    assert rejected(out) == {
        "a-000001": "bad_schema",
        "a-000002": "bad_schema",
        "a-000003": "bad_schema",
        "a-000004": "bad_json",
        "c-000001": "missing_text",
    }
    samples = imported(out)
    assert said(samples["a-000000"]) == [("user", "<|image|>"), ("assistant", "Red")]
    assert said(samples["b-000000"]) == [("user", "1+1"), ("assistant", "2")]
    assert said(samples["c-000000"])[1][1] == "<image> is a tag of nothing"


def test_a_folder_of_media_is_captioned_by_the_texts_beside_them(tmp_path: Path) -> None:
    source, out = tmp_path / "holiday", tmp_path / "out"
    red, clip = picture(source / "sea/red.jpg"), video(source / "sail.mp4")
    (source / "sea/red.txt").write_text("A red sea.\n")
    (source / "sail.txt").write_text("A sail.")
    picture(source / "lonely.png")
    (source / "gone.txt").write_text("Its picture is gone.")
    picture(source / "mute.png")
    (source / "mute.txt").write_text("\n")
    (source / "torn.mp4").write_bytes(clip[:300])
    (source / "torn.txt").write_text("Torn.")
    (source / "zero.mp4").write_bytes(b"")
    (source / "zero.txt").write_text("Zero.")
    summary = run(source, out)
    assert summary.imported == {"image": 1, "video": 1}
    assert sorted(rejected(out).values()) == [
        "empty_file", "missing_caption", "missing_caption", "missing_file", "undecodable_video",
    ]  # fmt: skip
    by_origin = {sample["origin"]: sample for sample in imported(out).values()}
    sea, sail = by_origin["sea/red.jpg"], by_origin["sail.mp4"]
    assert said(sea) == [("user", "<|image|>"), ("assistant", "A red sea.")]
    assert said(sail) == [("user", "<|video|>"), ("assistant", "A sail.")]
    assert (sea["kind"], sea["members"]) == ("caption", {"0.jpg": red})
    assert (sail["kind"], sail["members"]) == ("caption", {"0.mp4": clip})


def test_tables_and_image_folders_with_metadata(tmp_path: Path) -> None:
    red, clip = picture(tmp_path / "t/pics/red.png"), video(tmp_path / "t/clip.mp4")
    with (tmp_path / "t/table.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["video_path", "caption"])
        rows.writerow(["clip.mp4", "Grey,\nthen black"])
        rows.writerow(["pics/red.png", "Red"])
        rows.writerow(["notes.doc", "?"])
        rows.writerow(["clip.mp4", ""])
        rows.writerow(["clip.mp4"])
    assert run(tmp_path / "t/table.csv", tmp_path / "csv").imported == {"video": 1, "image": 1}
    samples = imported(tmp_path / "csv")
    assert said(samples["table-000000"]) == [
        ("user", "<|video|>"),
        ("assistant", "Grey,\nthen black"),
    ]
    assert samples["table-000001"]["members"] == {"0.png": red}
    # A column named video_path vouches for a file whose suffix says nothing: it is looked for.
    assert rejected(tmp_path / "csv") == {
        "table-000002": "missing_file",
        "table-000003": "missing_caption",
        "table-000004": "bad_csv",
    }

    table = pyarrow.table({
        "image": [{"bytes": red, "path": None}, {"bytes": None, "path": "pics/red.png"}],
        "alt": ["inside", "outside"],
        "label": [1, 2],
    })  # fmt: skip
    pyarrow.parquet.write_table(table, tmp_path / "t/p.parquet")
    with pytest.raises(ShardError, match=r"p\.parquet: no column caption or .* --caption-column"):
        run(tmp_path / "t/p.parquet", tmp_path / "nothing")
    columns = {"media_column": "image", "caption_column": "alt"}
    assert run(tmp_path / "t/p.parquet", tmp_path / "pq", **columns).imported == {"image": 2}
    assert [said(sample)[1][1] for sample in imported(tmp_path / "pq").values()] == [
        "inside", "outside",
    ]  # fmt: skip

    folder = tmp_path / "hf"
    picture(folder / "train/a.png")
    picture(folder / "train/b.png")
    write_jsonl(folder / "train/metadata.jsonl", [{"file_name": "./a.png", "text": "An a"}])
    assert run(folder, tmp_path / "hf_out").imported == {"image": 1}
    assert said(imported(tmp_path / "hf_out")["train-000000"])[1][1] == "An a"
    assert rejected(tmp_path / "hf_out") == {"unnamed-000000": "missing_caption"}  # b.png
    assert clip


def test_shards_of_others(tmp_path: Path, toy: Path) -> None:
    red, blue = picture(tmp_path / "r.jpg"), picture(tmp_path / "b.webp", "blue")
    clip = video(tmp_path / "c.mp4")
    source = tmp_path / "wds"
    source.mkdir()
    laion = json.dumps({"caption": "From JSON", "width": 12}).encode()
    members = {
        "000.jpg": red, "000.txt": b"Red", "000.json": laion,
        "001.webp": blue, "001.json": laion,
        "002.mp4": clip, "002.txt": "Grün".encode(),
        "003.jpg": red, "003.cls": b"7",
        "004.jpg": red, "004.json": b"{",
        "a/005.jpg": red[:200], "a/005.txt": b"Broken",
    }  # fmt: skip
    write_tar(source / "00000.tar", members)
    whole = (source / "00000.tar").read_bytes()
    (source / "00001.tar").write_bytes(whole[:1800])  # its tail is gone, in the second member
    summary = run(source, tmp_path / "out")
    assert summary.imported == {"image": 2, "video": 1}
    assert rejected(tmp_path / "out") == {
        "00000-000003": "missing_caption",
        "00000-000004": "bad_json",
        "00000-000005": "undecodable_image",
        "00001-000000": "missing_caption",  # its text lies behind the damage
        "00001-000001": "damaged_shard",
    }
    samples = imported(tmp_path / "out")
    assert [said(sample)[1][1] for sample in samples.values()] == ["Red", "From JSON", "Grün"]
    assert samples["00000-000000"]["members"] == {"0.jpg": red}
    assert samples["00000-000001"]["members"] == {"0.webp": blue}
    assert samples["00000-000000"]["origin"] == "00000.tar/000"

    # Our own shards come back as they were.
    assert run(toy / "sft/heldout", tmp_path / "again").imported == {
        "text": 8,
        "image": 8,
        "video": 8,
    }
    ours = {(str(said(s)), str(s["media"]), s["kind"], str(s["members"])) for s in
            imported(toy / "sft/heldout").values()}  # fmt: skip
    back = {(str(said(s)), str(s["media"]), s["kind"], str(s["members"])) for s in
            imported(tmp_path / "again").values()}  # fmt: skip
    assert ours == back


def test_event_captions_show_the_frames_up_to_each_events_end(tmp_path: Path) -> None:
    clip = video(tmp_path / "clip.mp4", seconds=6)
    mode = "[Streaming Event Caption]"

    def record(
        ends: list[Any], answer: str, extra: int = 0, start: str = "00:00"
    ) -> dict[str, Any]:
        events = [{"start": start, "end": end} for end in ends]
        info = json.dumps({"video_path": "clip.mp4", "time_info": events})
        return {
            "messages": [
                {"role": "user", "content": "Tell me what happens."},
                {"role": "assistant", "content": answer},
            ],
            "videos": [f"{mode}[INFO]{info}"] + [f"{mode}[PLACEHOLDER]"] * (len(ends) - 1 + extra),
        }

    two = "<video>It is dark.<|video|>It is light."
    records = [
        record(["00:02", "00:04.5"], two),
        record(["00:02", "00:02"], two),
        record(["00:02", 60], two),
        record(["00:02", "00:04"], two, extra=1),
        record(["00:02", "soon"], two),
        record(["00:04.5", "00:02"], two),
        record(["00:01", "00:02"], two, start="00:01.5"),
    ]
    (tmp_path / "events.json").write_text(json.dumps(records))
    run(tmp_path / "events.json", tmp_path / "out")
    assert rejected(tmp_path / "out") == {
        "events-000002": "frame_after_end",
        "events-000003": "mark_media_mismatch",
        "events-000004": "bad_schema",
        "events-000005": "bad_time",
        "events-000006": "bad_time",
    }
    first, second = imported(tmp_path / "out").values()
    # 0, 1 and 2 s are shown before the first event has ended, 3 and 4 s before the second.
    assert first["messages"][1]["content"] == (
        "<|video|>" * 3 + "It is dark." + "<|video|>" * 2 + "It is light."
    )
    assert first["media"] == [{"type": "video", "file": "0.mp4", "times": [0, 1, 2, 3, 4]}]
    assert (first["kind"], first["members"]) == ("realtime", {"0.mp4": clip})
    assert second["messages"][1]["content"].count("<|video|>") == 4


def test_a_source_that_is_nothing_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(ShardError, match="no JSON file, table, shard, picture or video there"):
        run(tmp_path, tmp_path / "out")
    with pytest.raises(ShardError, match="--form parquet: choose one of sharegpt, alpaca"):
        run(tmp_path, tmp_path / "out", form="parquet")
    with pytest.raises(ShardError, match=r"a.json does not exist"):
        run(tmp_path / "a.json", tmp_path / "out")
    write_jsonl(tmp_path / "b.jsonl", [{"colour": 1}])
    with pytest.raises(ShardError, match=r"fields colour: not a known form. The nearest: share"):
        run(tmp_path / "b.jsonl", tmp_path / "out")
