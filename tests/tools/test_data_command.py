"""`moss-data import` and `moss-data show` from the command line, on small real files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.build import BuildOptions, build_shards
from data_pipeline.encode import EncodeConfig
from data_pipeline.shards import write_shards
from data_pipeline.tokens import build_toy_tokenizer
from tests.data_pipeline.clips import every, video
from tools.data.__main__ import main
from tools.data.mixture import mixture, packing
from tools.shards.encoding import open_encoder
from tools.shards.find import stored_samples
from tools.shards.stats import source_stats

FAST = ["--workers", "0", "--tile-size", "32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten good records of a 6 s clip, four without their clip, one of a bad time, one cut off."""
    folder = tmp_path_factory.mktemp("data")
    video(folder / "a.mp4", every(0.2, 30))
    good = {
        "video_path": "a.mp4",
        "question": [{"content": "What moves?", "time": "2"}],
        "response": [{"content": "A bar.", "st_time": 2, "end_time": 4, "time": ""}],
    }
    bad = good | {"question": [{"content": "?", "time": -1}]}
    lines = [good] * 10 + [good | {"video_path": "gone.mp4"}] * 4 + [bad]
    (folder / "s.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"video_pa')
    return folder


def test_a_check_counts_by_reason_with_three_examples(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main(["import", str(folder / "s.jsonl"), "--check", "--page", str(page), *FAST]) == 0
    out = capsys.readouterr().out
    assert out.startswith("form: streamo\nrealtime: 10 samples\n")
    assert "skipped, missing_file: 4\n" in out
    assert out.count("gone.mp4: No such file") == 3
    assert "skipped, bad_time: 1\n    s-000014 (s.jsonl): question[0].time: -1 is not a time" in out
    assert "skipped, bad_json: 1\n    s-000015 (s.jsonl)" in out
    assert "16 records: 10 usable, 6 skipped" in out
    html = page.read_text()
    assert html.count("<h2>s-00000") == 5
    assert html.count("<figure class=frame>") == 5 * 6
    assert html.count("<figcaption>5.0 s @") == 5
    assert "<span class=label>A bar.&lt;|silence|&gt;</span>" in html
    assert "<span class=label>What" not in html
    assert not list(folder.glob("*/*.tar"))


def test_an_import_says_its_form_and_show_counts_what_it_made(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shards"
    assert main(["import", str(folder / "s.jsonl"), str(out), "--workers", "0"]) == 0
    assert "form streamo" in capsys.readouterr().err
    page = tmp_path / "p.html"
    assert main(["show", str(out), "--length", "256", "--page", str(page), *FAST]) == 0
    _, row = capsys.readouterr().out.splitlines()[:2]
    # samples, frames, and image tokens; no error
    assert [row.split()[column] for column in (1, 2, 4, -1)] == ["10", "60", "60", "-"]
    html = page.read_text()
    assert "<svg" in html
    assert html.count("<figure class=frame>") == 5 * 6


def test_counts_are_those_of_the_encoder(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    build_shards(folder / "s.jsonl", out, BuildOptions())
    (tmp_path / "chat").mkdir()
    clip = (folder / "a.mp4").read_bytes()
    turns = [{"role": "user", "content": "<|video|>?"}, {"role": "assistant", "content": "Bars"}]
    record = {"messages": turns, "media": [{"type": "video", "file": "0.mp4"}], "kind": "chat"}
    samples = [
        {"__key__": f"c{i}", "json": json.dumps(record).encode(), "0.mp4": clip} for i in range(3)
    ]
    write_shards(samples, tmp_path / "chat")
    build_toy_tokenizer(tmp_path / "tokenizer", ["What moves? A bar."])
    config = EncodeConfig(
        tokenizer=str(tmp_path / "tokenizer"), sequence_length=512, tile_size=32, max_tiles=1,
        video_fps=1, video_min_frames=1, video_max_frames=256, prompt="realtime",
    )  # fmt: skip
    sources = [out / "realtime", tmp_path / "chat"]
    counted = mixture(sources, config, workers=0)
    for source, stats in source_stats(sources, config, workers=0).items():
        mine = counted[source]
        assert (mine.samples, mine.frames) == (stats.samples, stats.frames)
        assert (mine.text + mine.frames, mine.labels) == (stats.tokens, stats.labels)
        assert (mine.silence, mine.realtime_labels) == (stats.silence, stats.realtime_labels)
    (shard,) = (out / "realtime").glob("*.tar")
    encoder = open_encoder(config)
    lengths = [len(encoder.encode(s.key, s.parts).tokens) for s in stored_samples(shard)]
    assert [tokens for tokens, _ in counted[out / "realtime"].lengths] == lengths


def test_packing_is_the_filled_share_of_microbatches() -> None:
    # 60 + 40, 60 + 40, 50: three of 100.
    lengths = [(60, 1), (40, 1), (60, 1), (40, 1), (50, 1)]
    assert packing(lengths, 100) == pytest.approx(250 / 300)
    assert packing([(100, 1)] * 4, 100) == 1.0


def test_a_missing_folder_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(tmp_path / "none")]) == 1
    assert "is not a folder" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "a.jsonl")]) == 2
    assert "OUT is missing" in capsys.readouterr().err
