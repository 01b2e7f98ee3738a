"""The commands that look into shards, on samples whose contents are known."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.build import build_shards
from data_pipeline.importers.webdataset import read_samples
from data_pipeline.index import prepare_index
from data_pipeline.shards import write_shards
from tests.conftest import REPO
from tests.samples import graded_video
from tools.shards.__main__ import main
from tools.shards.find import find_sample

TILE = ["--tile-size", "56"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy")
    # In a process of its own: a fork of this one, with the threads of other tests, may hang.
    command = [sys.executable, "-m", "data_pipeline.toy", str(out), "--samples-per-shard", "5"]
    subprocess.run(
        [*command, "--train", "12", "--heldout", "4", "--stages", "sft"], cwd=REPO, check=True
    )
    return out


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three real-time records; the third is as long as 4,096 tokens and more."""
    folder = tmp_path_factory.mktemp("streams")
    graded_video(folder / "clip.mp4", [i / 10 for i in range(30)])
    Image.new("RGB", (32, 32), "red").save(folder / "red.png")

    def record(answer: str, seconds: int) -> dict[str, Any]:
        times = [f"00:0{second}" for second in range(seconds)]
        info = json.dumps({"video_path": "clip.mp4", "time_info": times})
        more = ["[RealTime QA][PLACEHOLDER]"] * (seconds - 1)
        return {
            "messages": [
                {"role": "user", "content": "Watch."},
                {"role": "assistant", "content": answer},
            ],
            "videos": [f"[RealTime QA][INFO]{info}", *more],
        }

    records = [
        record("<|silence|><|video|><|silence|><|video|>It is grey.<|video|><|silence|>", 3),
        record("<|video|>Dark now<|video|><|silence|>", 2),
        record("<|video|>" + "zqj " * 3000, 1),
    ]
    (folder / "rt.json").write_text(json.dumps(records))
    build_shards(folder / "rt.json", folder / "out")
    return folder / "out" / "realtime"


def test_ls_counts_and_sees_a_stale_index(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(toy / "sft/train", tmp_path / "train")
    (tmp_path / "train/text/shard-000002.tar").unlink()
    shutil.rmtree(tmp_path / "train/video/.nv-meta")
    assert main(["ls", str(tmp_path)]) == 0
    header, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert header == ["source", "shards", "samples", "MB", "index"]
    assert [[Path(row[0]).name, row[1], row[2], row[4]] for row in rows] == [
        ["image", "3", "12", "ok"], ["text", "2", "12", "stale"], ["video", "3", "?", "missing"],
    ]  # fmt: skip
    assert main(["ls", str(tmp_path / "nothing")]) == 1
    assert "nothing is not a folder" in capsys.readouterr().err


def test_show_marks_labels_frames_and_times(
    toy: Path, streams: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.png"
    tokenizer = ["--tokenizer", str(toy / "tokenizer"), *TILE]
    assert main(["show", str(streams), "0", *tokenizer, "--png", str(sheet)]) == 0
    out = capsys.readouterr().out
    title, counts, *prompt, last = out.splitlines()
    assert title == "rt-000000 (shard-000000.tar), realtime, from rt.json"
    assert counts.endswith("3 frames")
    user, answer = prompt[1:]
    assert user == "user: Watch.<|eot_id|>"
    assert last == f"frames: {sheet}"
    # A frame's place in the prompt is its token's: each frame is one token, silence is one.
    first = int(answer.split("[0 | 0.0s @")[1].split("]")[0])
    assert (
        f"«<|silence|>»[0 | 0.0s @{first}]«<|silence|>»[1 | 1.0s @{first + 2}]«It is grey.»"
        in answer
    )
    assert answer.startswith("assistant: «")
    assert answer.endswith("«<|silence|>»<|eot_id|>")  # the end of a real-time turn is no label
    with Image.open(sheet) as picture:
        assert picture.size == (3 * 224, 224 + 18)
        # Frame i of the clip has brightness 8 i, ten of them are a second; the clip is 96 x 64,
        # so that the lower third of a tile is padding.
        pixels = np.asarray(picture.convert("L"))
    assert [round(float(pixels[20, 224 * i + 28]) / 8) for i in range(3)] == [0, 10, 20]

    assert main(["show", str(streams), "rt-000001", *tokenizer, "--color", "always",
                 "--png", str(sheet)]) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "\x1b[32mDark now\x1b[0m\x1b[36m[1 | 1.0s" in out
    assert "«" not in out


def test_show_finds_by_number_and_says_what_is_not_there(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = toy / "sft/train/image"
    stored = [s["__key__"] for shard in sorted(source.glob("*.tar")) for s in
              read_samples(str(shard))]  # fmt: skip
    assert len(stored) == 12
    for number in (0, 4, 5, 11):
        assert find_sample(source, str(number)).key == stored[number]
    options = ["--tokenizer", str(toy / "tokenizer"), "--stage", "pt1", *TILE]
    assert main(["show", str(source), "11", *options]) == 0
    assert f"frames: {stored[11]}.png" in capsys.readouterr().out
    assert (tmp_path / f"{stored[11]}.png").exists()
    assert main(["show", str(source), "12", *options]) == 1
    assert "no sample 12: it has 12, the first is 0" in capsys.readouterr().err
    assert main(["show", str(source), "nobody", *options]) == 1
    assert "no sample with the key nobody" in capsys.readouterr().err


def test_stats_count_what_is_trained_on(
    toy: Path, streams: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = ["--tokenizer", str(toy / "tokenizer"), *TILE]
    assert (
        main(
            [
                "stats",
                str(streams),
                "--workers",
                "0",
                "--stage",
                "realtime_sft",
                "--json",
                *tokenizer,
            ]
        )
        == 0
    )
    (row,) = json.loads(capsys.readouterr().out).values()
    assert (row["samples"], row["frames"], row["errors"]) == (3, 6, {})
    assert row["truncated_ratio"] == 0.3333
    # "It is grey.", "Dark now" and 3,000 times "zqj", in 3 + 2 + 1 seconds.
    assert row["words_per_second"] == round((3 + 2 + 3000) / 6, 4)
    assert row["silence_ratio"] == round(4 / row["labels"], 4)

    assert (
        main(
            [
                "stats",
                str(toy / "sft/train"),
                "--workers",
                "0",
                "--stage",
                "pt2",
                "--json",
                *tokenizer,
            ]
        )
        == 0
    )
    rows = {Path(k).name: v for k, v in json.loads(capsys.readouterr().out).items()}
    assert {name: row["samples"] for name, row in rows.items()} == {
        "image": 12, "text": 12, "video": 12,
    }  # fmt: skip
    assert rows["image"]["frames"] == 12
    assert rows["text"]["frames"] == 0
    assert rows["video"]["frames"] == 12 * 8  # 4 s at 2 fps
    assert rows["video"]["silence_ratio"] is None


def sample(
    key: str, content: str, media: list[dict[str, Any]], answer: str = "A", **members: bytes
) -> Any:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    files = {name.replace("_", ".").lstrip("m"): data for name, data in members.items()}
    return {"__key__": key, "json": {"messages": messages, "media": media}, **files}


def test_a_good_tree_is_valid_and_each_fault_is_named(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = ["--tokenizer", str(toy / "tokenizer"), *TILE]
    assert main(["validate", str(toy), "--workers", "0", *tokenizer]) == 0
    assert f"{toy}: 48 samples, no problems" in capsys.readouterr().out

    picture = (tmp_path / "p.png", Image.new("RGB", (9, 9)))
    picture[1].save(picture[0])
    graded_video(tmp_path / "v.mp4", [i / 10 for i in range(30)])
    png, mp4 = picture[0].read_bytes(), (tmp_path / "v.mp4").read_bytes()

    image, clip = {"type": "image", "file": "0.png"}, {"type": "video", "file": "0.mp4"}
    tree = tmp_path / "tree"
    write_shards([
        sample("good", "<|image|>", [image], m0_png=png),
        sample("marks", "<|image|><|image|>", [image], m0_png=png),
        sample("lost", "<|image|>", [image]),
        sample("extra", "", [], m0_png=png),
        sample("torn", "<|image|>", [image], m0_png=png[:40]),
        sample("short", "<|video|>", [clip], m0_mp4=mp4[: len(mp4) // 3]),
        {"__key__": "schema", "json": {"messages": "none"}},
        sample("typed", "<|end_of_text|>", []),
        sample("mute", "Show it.", [image], " <|image|>", m0_png=png),
        sample("CAPS", "<|image|>", [image | {"file": "0.PNG"}], m0_PNG=png),
        sample("camera", "<|image|>", [image], m0_PNG=png),
    ], tree / "a")  # fmt: skip
    prepare_index(tree / "a")
    write_shards([sample(f"k{i}", "", []) for i in range(6)], tree / "b", samples_per_shard=3)
    prepare_index(tree / "b")
    second = tree / "b/shard-000001.tar"
    second.write_bytes(second.read_bytes()[:1600])  # into its second sample
    (tree / "b/shard-000002.tar").write_bytes((tree / "b/shard-000000.tar").read_bytes())
    (tree / "b/shard-000003.tar.partial").touch()

    assert main(["validate", str(tree), "--workers", "0", *tokenizer]) == 1
    lines = [line.removeprefix(f"{tree}/") for line in capsys.readouterr().out.splitlines()]
    a, b = "a/shard-000000.tar ", "b/shard-00000"
    expected = [
        f"{a}marks: mark_media_mismatch:",
        f"{a}lost: missing_media: 0.png is not in the shard",
        f"{a}extra: unused_member: 0.png is not a medium of the sample",
        f"{a}torn: undecodable_image: 0.png:",
        f"{a}short: undecodable_video: 0.mp4:",
        f"{a}schema: bad_schema: messages:",
        f"{a}mute: missing_text: messages[1]: the assistant's turn has no text",
        f"{b}3.tar.partial: unfinished",
        "b: the index does not match the shards (shard-000002.tar)",
        f"{b}1.tar: damaged_shard: after 1 samples",
        f"{b}1.tar: 1 samples, the index has 3: make it again",
        f"{b}2.tar: the key k0 is also in shard-000000.tar",
        f"{b}2.tar: the key k1 is also in",
        f"{b}2.tar: the key k2 is also in",
        f"{tree}: 18 samples, 14 problems",
    ]
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)
