"""The clip that ends the demo, and what is to be said of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.toy.build import ToyConfig, build_toy
from data_pipeline.video import probe_video
from tools.demo.narrate import held_out_clip, sentences_of


def test_a_held_out_clip_and_its_story(tmp_path: Path) -> None:
    build_toy(tmp_path, ToyConfig(train=2, heldout=20, seed=1, stages=("realtime_sft",)))
    content = held_out_clip(tmp_path, tmp_path / "clip.mp4")
    story = sentences_of(content)
    assert probe_video((tmp_path / "clip.mp4").read_bytes()).duration >= content.count("<|video|>")
    assert story[0][0] == 0
    assert all(words.endswith(".") and "<" not in words for _, words in story)
    with pytest.raises(ValueError, match="no held-out clip"):
        held_out_clip(tmp_path / "none", tmp_path / "clip.mp4")


def test_a_sentence_belongs_to_the_second_in_which_it_begins() -> None:
    content = (
        "<|video|>A white circle and a<|video|> pink square.<|silence|><|video|><|silence|>"
        "<|video|>It leaves.<|silence|>"
    )
    assert sentences_of(content) == [(0, "A white circle and a pink square."), (3, "It leaves.")]
