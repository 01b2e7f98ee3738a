"""The benchmark runs, and what it compares with computes the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from inference.bench import __main__ as bench
from inference.bench import measure
from inference.bench.published import PublishedModel
from tests.inference.tiny import generated_logits, tiny_model


def test_the_published_way_gives_the_same_tokens() -> None:
    model = tiny_model(tokens_before_first_frame="attend_all")
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(10, 250, (1, 12), generator=generator)
    tokens[0, [2, 3, 7]] = 512
    pixels = torch.randn(1, 3, 1, 3, 56, 56, generator=generator)
    wanted = generated_logits(model, input_ids=tokens, pixel_values=pixels)
    got = generated_logits(PublishedModel(model), input_ids=tokens, pixel_values=pixels)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


def test_the_same_keys_and_values_move_no_logits() -> None:
    model = tiny_model()
    assert measure.moved_by_kept(model, "auto") == 0
    assert 0 < measure.moved_by_kept(model, "fp8") < 0.1


@pytest.mark.parametrize("mode", ["offline", "stream"])
def test_prints_a_table_and_writes_json_and_png(mode, tmp_path: Path, monkeypatch, capsys) -> None:
    options = "--model small --random-weights --baseline hf --frames 6 --new-tokens 4 --device cpu"
    command = ["bench", mode, *options.split(), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    bench.main()
    found = json.loads((tmp_path / f"bench-{mode}.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    decode, memory = rows["decode"], rows["keys and values of a frame"]
    assert decode["gain"] == pytest.approx(decode["ours"] / decode["published"])
    # Keys and values x 5 vision tokens x 32 numbers of one KV head x 4 bytes; 4 heads.
    assert memory["ours"] == pytest.approx(2 * 5 * 32 * 4 / 1e6)
    assert memory["gain"] == pytest.approx(4)
    assert (tmp_path / f"bench-{mode}.png").stat().st_size > 5000
    assert "published" in capsys.readouterr().out


def test_the_floor_stands_beside_each_figure(tmp_path: Path, monkeypatch, capsys) -> None:
    options = "--model small --random-weights --frames 4 --new-tokens 4 --device cpu --table"
    options += " --clock cpu"  # which other processes do not change
    command = ["bench", "stream", *options.split(), "--sessions", "3", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    bench.main()
    found = json.loads((tmp_path / "bench-stream.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    decode, many = rows["decode"], rows["decode, 3 sessions in all"]
    assert decode["of_floor"] == pytest.approx(decode["floor"] / decode["ours"])
    assert decode["of_floor"] > 1
    assert rows["frame -> decision"]["of_floor"] > 1
    assert decode["floor"] < many["floor"] < 3 * decode["floor"]  # weights are read once for all
    joined, question = rows["question with a frame -> first token"], rows["question -> first token"]
    assert joined["floor"] > question["floor"]
    late = rows["question of 30 -> first token, p95"]
    assert question["floor"] < late["floor"] <= late["ours"]
    assert rows["frame -> decision, p95"]["ours"] >= rows["frame -> decision"]["ours"]
    assert rows["16 pictures to the device"]["ours"] > 0
    assert found["machine"]["bytes_per_s"] > 1e8
    head = next(line for line in capsys.readouterr().out.splitlines() if "floor" in line)
    assert "published" not in head  # nothing was compared


def test_live_sessions_all_speak(tmp_path: Path, monkeypatch) -> None:
    options = "--model small --random-weights --frames 4 --device cpu --table"
    several = ["--sessions", "3", "--seconds", "6", "--fps", "2"]
    command = ["bench", "serve", *options.split(), *several, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    bench.main()
    found = json.loads((tmp_path / "bench-serve.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert found["decisions"] == 3 * 6 * 2 - rows["frames dropped"]["ours"]
    each, slowest = rows["each of 3 sessions"], rows["the slowest of them"]
    assert 1 < slowest["ours"] <= each["ours"] < each["floor"]
    assert rows["frame -> decision, p95"]["of_floor"] > 1


def test_an_endless_stream_has_ten_tenths(monkeypatch, capsys) -> None:
    command = ["bench", "stream", "--model", "small", "--random-weights", "--endless", "5"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        bench.parse()
    assert "argument --endless: 5: must be" in capsys.readouterr().err


def test_memory_of_an_endless_stream_is_flat(tmp_path: Path, monkeypatch) -> None:
    options = "--model small --random-weights --endless 600 --window 16 --frames 10 --device cpu"
    monkeypatch.setattr(sys, "argv", ["bench", "stream", *options.split(), "--out", str(tmp_path)])
    bench.main()
    found = json.loads((tmp_path / "bench-stream.json").read_text())["endless"]
    assert found["cached_frames"] == 16
    assert found["text_tokens"] <= 1044
    assert found["megabytes"][-1] - found["megabytes"][1] < 5
    assert len(found["milliseconds"]) == 10
    assert min(found["milliseconds"]) > 0
