"""A sample's members to tensors: which moments its frames show, and what a cut leaves of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.encode import SampleEncoder
from data_pipeline.schema import SampleError
from data_pipeline.tokens import load_tokenizer
from tests.data_pipeline.loader.test_loader import encode_config
from tests.data_pipeline.test_video import make_video


def realtime(seconds: int, **clip: Any) -> dict[str, bytes]:
    """A frame a second; frame i of the clip, ten a second, has brightness 3 i."""
    answer = "<|silence|><|video|>" * seconds
    turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": answer}]
    media = [{"type": "video", "file": "0.mp4", **clip}]
    data = {"messages": turns, "media": media, "kind": "realtime"}
    video = make_video([i / 10 for i in range(80)], step=3)
    return {"json": json.dumps(data).encode(), "0.mp4": video}


def encoder(toy: Path, **changes: Any) -> SampleEncoder:
    config = encode_config(toy, prompt="chat", video_fps=5.0, video_max_frames=64, **changes)
    return SampleEncoder(config, load_tokenizer(config.tokenizer))


def levels(frames: Any) -> list[int]:
    """The frame number of each, from the brightness of its upper half; the lower is padding."""
    return [round(frame[0, :, :10].float().mean().item() / 3) for frame in frames]


def test_a_realtime_clip_is_shown_at_every_second_from_0(toy: Path) -> None:
    sample = encoder(toy).encode("k", realtime(8))
    assert levels(sample.frames) == [0, 10, 20, 30, 40, 50, 60, 70]


def test_a_realtime_clip_is_shown_at_the_times_that_it_states(toy: Path) -> None:
    sample = encoder(toy).encode("k", realtime(3, times=[0.5, 1.5, 4.0]))
    assert levels(sample.frames) == [5, 15, 40]


def test_a_clip_that_ends_before_its_conversation_is_refused(toy: Path) -> None:
    with pytest.raises(SampleError, match=r"frame_after_end: no frame at 9.00 s, the last is at"):
        encoder(toy).encode("k", realtime(10))


def test_in_a_stage_of_streams_other_samples_are_chats(toy: Path) -> None:
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A man."}]
    question = {"json": json.dumps({"messages": turns}).encode()}
    tokens = {}
    for prompt in ("chat", "realtime", "pretrain"):
        config = encode_config(toy, prompt=prompt)
        encoded = SampleEncoder(config, load_tokenizer(config.tokenizer)).encode("k", question)
        tokens[prompt] = encoded.tokens.tolist()
    assert tokens["realtime"] == tokens["chat"] != tokens["pretrain"]


def test_members_are_found_in_any_letter_case(toy: Path) -> None:
    """Training reads names as they are written, the commands and validation in lower case."""
    parts = realtime(3)
    described = json.loads(parts["json"])
    described["media"][0]["file"] = "0.MP4"
    for data, clip in (("json", "0.mp4"), ("JSON", "0.MP4"), ("json", "0.Mp4")):
        named = {data: json.dumps(described).encode(), clip: parts["0.mp4"]}
        assert levels(encoder(toy).encode("k", named).frames) == [0, 10, 20]


def test_a_cut_leaves_the_first_frames(toy: Path) -> None:
    whole = encoder(toy).encode("k", realtime(8))
    place = int(whole.frame_positions[3])
    cut = encoder(toy, sequence_length=place).encode("k", realtime(8))
    assert levels(cut.frames) == [0, 10, 20]
    longer = encoder(toy, sequence_length=place + 1).encode("k", realtime(8))
    assert levels(longer.frames) == [0, 10, 20, 30]
    assert [cut.truncated, longer.truncated, whole.truncated] == [True, True, False]
    assert cut.frame_positions.tolist() == whole.frame_positions[:3].tolist()
    assert len(cut.tokens) == place


def test_what_lies_beyond_a_cut_is_not_decoded(toy: Path) -> None:
    parts = realtime(8)
    place = int(encoder(toy).encode("k", parts).frame_positions[3])
    damaged = bytearray(parts["0.mp4"])
    start = damaged.index(b"mdat")
    end = damaged.index(b"moov")
    middle = (start + end) // 2 + 200
    damaged[middle : end - 8] = b"\xff" * (end - 8 - middle)
    cut = encoder(toy, sequence_length=place).encode("k", {**parts, "0.mp4": bytes(damaged)})
    assert levels(cut.frames) == [0, 10, 20]
    with pytest.raises(SampleError, match="undecodable_video"):
        encoder(toy).encode("k", {**parts, "0.mp4": bytes(damaged)})
