"""Which attention a job takes: here on a CPU, where FlexAttention runs uncompiled."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest

from data_pipeline import attention_kinds
from moss_train.config import ParallelConfig
from moss_train.model import choose_attention
from moss_train.model.choose_attention import Trial
from tests.moss_train.model.build import preset
from tests.stand_ins import stand_in

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch, caplog):
    """With nothing remembered; triton is there, and FlexAttention's backward pass not refused."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *heads: None)
    monkeypatch.setattr(
        attention_kinds, "find_spec", lambda name: name if name in ("torch", "triton") else None
    )
    for name, value in (("TEXT", 256), ("ENCODED", 1), ("CLIP", 32)):
        monkeypatch.setattr(choose_attention, name, value)
    monkeypatch.setattr(logging.getLogger("moss_train"), "propagate", True)
    caplog.set_level(logging.INFO, "moss_train")


@pytest.fixture
def choose(groups):
    """The choice of a model whose tokens before the first frame attend all or nothing."""

    def choose(attention: str, **fields: Any) -> str:
        model = replace(preset("toy"), attention=attention, **fields)
        return Trial(model, ParallelConfig(), groups).choose()

    return choose


@pytest.mark.parametrize("before", ["zero", "attend_all"])
def test_the_fastest_is_taken_and_remembered(choose, before, caplog, monkeypatch):
    fields = {"tokens_before_first_frame": before}
    chosen = choose("auto", **fields)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("model.attention=flex computes what torch does on CPU, compared in")
    assert lines[1].startswith(f"attention: {chosen} (sdpa ")
    assert len(lines) == 2
    monkeypatch.setattr(choose_attention, "attend_frames", None)  # nothing runs any more
    assert choose("auto", **fields) == chosen
    assert caplog.records[-1].getMessage() == lines[1]


@pytest.mark.parametrize("attention", ["auto", "flex"])
def test_torch_s_own_is_taken_in_place_of_a_wrong_one(choose, attention, caplog, monkeypatch):
    right = choose_attention.attend_frames
    monkeypatch.setattr(choose_attention, "attend_frames", lambda *x: 1.01 * right(*x))
    assert choose(attention) == "sdpa"
    (line,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert line.startswith("model.attention=flex is not used on CPU: text of [300] tokens, 40 fr")


def test_flash_attn_proves_itself_in_all_places(choose, caplog, monkeypatch):
    """Text and tower are right here; the frames come last."""
    module = stand_in(monkeypatch, "flash_attn_2")
    monkeypatch.setattr(attention_kinds, "find_spec", lambda name: name)
    right = module.flash_attn_func

    def whole(q, k, v, **options):
        out, *others = right(q, k, v, **options)
        return out * (1.02 if k.shape[1] != q.shape[1] else 1), *others

    monkeypatch.setattr(module, "flash_attn_func", whole)
    assert choose("flash", dtype="bf16") == "sdpa"
    said = "model.attention=flash is not used on CPU: frames that all tokens of a block see: "
    assert caplog.records[-1].getMessage().startswith(said)


def test_on_a_cpu_nothing_is_tried(groups, caplog):
    for asked, expected in (("auto", "sdpa"), ("sdpa", "sdpa"), ("flex", "flex")):
        model = replace(preset("toy"), attention=asked)
        chosen = choose_attention.choose_attention(model, ParallelConfig(), groups)
        assert chosen == replace(model, attention=expected)
    assert not caplog.records
