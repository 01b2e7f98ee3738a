from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.build import build_shards, main
from data_pipeline.encode import EncodeConfig, SampleEncoder
from data_pipeline.loader.loader import build_loader
from data_pipeline.loader.order import Part
from data_pipeline.loader.state import Source
from data_pipeline.shards import ShardError, check_source
from data_pipeline.tokens import load_tokenizer


def test_the_real_files_become_shards_and_three_records_are_rejected(
    real_files: Path, tmp_path: Path, toy: Path
) -> None:
    summary = build_shards(real_files, tmp_path)
    assert summary.imported == {"image": 1, "video": 2, "realtime": 1}
    assert summary.rejected == {"missing_file": 3}
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [
        f"realtime_sharegpt_sample-00000{i}" for i in (1, 2, 3)
    ]
    missing = real_files / "data/mllm_realtime_data/PI2UGwbvDEY.mp4"
    assert lines[1]["detail"] == f"{missing}: No such file or directory"

    encode = EncodeConfig(str(toy / "tokenizer"), 1024, 56, 1, 1.0, 8, 16, "chat")
    sources = [
        Source("image", str(tmp_path / "image"), "image", 1),
        Source("video", str(tmp_path / "video"), "video", 1),
        Source("realtime", str(tmp_path / "realtime"), "video", 1),
    ]
    frames = {}
    with build_loader(
        sources, encode, Part(3, micro_batch=1, rank=1, size=3), workers=0, seed=0, shuffle_window=4
    ) as loader:
        for _, batch in zip(range(12), loader, strict=False):
            assert batch.skipped == {}
            frames[batch.keys[0]] = len(batch.frames)
    assert frames["realtime/realtime_sharegpt_sample-000000"] == 11
    assert frames["image/sharegpt_sample-000002"] == 1
    assert set(frames.values()) == {1, 9, 11}


def test_media_that_do_not_fit_are_rejected_with_the_reason(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")

    def record(content: str, **media: list[str]) -> dict[str, object]:
        user, answer = {"role": "user", "content": content}, {"role": "assistant", "content": "A"}
        return {"messages": [user, answer], **media}

    info = '[RealTime QA][INFO]{"video_path": "a.mp4", "time_info": ["00:00", "01:01"]}'
    records = [
        record("<|image|>?", images=["a.png"]),
        record("Just words"),
        record("<|image|><|image|>", images=["a.png"]),
        record("", images=["a.png"]),
        record("<|image|>", images=["broken.jpg"]),
        record("<|video|>", videos=[info]),
        record("<|video|>", videos=["[Streaming Event Caption]{}"]),
        record("<|video|>", videos=["[RealTime QA][INFO]{"]),
        ["no record"],
    ]
    (tmp_path / "my.data.json").write_text(json.dumps(records))
    summary = build_shards(tmp_path, tmp_path / "out")
    assert summary.imported == {"image": 1, "text": 1}
    lines = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    reasons = {line["key"]: line["reason"] for line in map(json.loads, lines)}
    assert reasons == {
        "my_data-000002": "mark_media_mismatch",
        "my_data-000003": "mark_media_mismatch",
        "my_data-000004": "undecodable_image",
        "my_data-000005": "mark_media_mismatch",
        "my_data-000006": "bad_schema",
        "my_data-000007": "bad_schema",
        "my_data-000008": "bad_schema",
    }
    assert check_source(tmp_path / "out" / "image").samples == 1


def test_a_source_without_json_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ShardError, match="no JSON file"):
        build_shards(tmp_path, tmp_path / "out")
    (tmp_path / "a.json").write_text("{")
    assert main([str(tmp_path), str(tmp_path / "out")]) == 1
    assert "a.json cannot be read" in capsys.readouterr().err


def test_frames_beyond_the_cut_are_dropped_with_their_marks(toy: Path) -> None:
    encode = EncodeConfig(str(toy / "tokenizer"), 9, 28, 1, 2.0, 8, 16, "pretrain")
    encoder = SampleEncoder(encode, load_tokenizer(encode.tokenizer))
    picture = toy / "a.png"
    Image.new("RGB", (30, 20), "red").save(picture)
    text = "<|image|><|image|>A<|image|>" + "word " * 9 + "<|image|>"
    data = {
        "messages": [{"role": "assistant", "content": text}],
        "media": [{"type": "image", "file": f"{i}.png"} for i in range(4)],
        "kind": "caption",
    }
    parts = {f"{i}.png": picture.read_bytes() for i in range(4)}
    sample = encoder.encode("k", {"json": json.dumps(data).encode(), **parts})
    assert sample.frame_positions.tolist() == [1, 2, 4]
    assert sample.frames.shape == (3, 1, 3, 28, 28)
    assert sample.aspect_ratio_ids.tolist() == [1, 1, 1]
    assert sample.truncated
    assert len(sample.tokens) == 9
