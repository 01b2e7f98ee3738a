"""Parity with the published MOSS-Video modules and with transformers' Mllama, in every layout."""

from __future__ import annotations

import pytest
import torch

from moss_train.config import ParallelConfig
from moss_train.convert.weights import export
from moss_train.model.packed_text import PackedText
from moss_train.verify.case import Case
from moss_train.verify.forward import plan_case
from tests.conftest import SHARED
from tests.moss_train.model.golden import (
    CASES,
    LIMITS,
    differences,
    golden_case,
    golden_model,
    mllama_case,
    mllama_model,
    run_case,
)
from tests.torchrun import run_ranks


def expect_parity(case: Case, got: dict[str, torch.Tensor]) -> None:
    """Everything that the reference recorded is there, within its limit."""
    missing = {
        name
        for name in case.expected
        if name.startswith("grad.") or name in ("vision_output", "projected", "logits", "loss")
    } - set(got)
    assert not missing
    worst = differences(case, got)
    print({name: f"{value:.1e}" for name, value in worst.items()})
    assert {name: value for name, value in worst.items() if value > LIMITS[name]} == {}


@pytest.fixture(scope="module")
def moss(shared, groups):
    return golden_model(shared / "golden", ParallelConfig(), groups)


@pytest.mark.parametrize("name", CASES)
def test_moss_video_matches_its_published_modules(name, shared, moss):
    case = golden_case(shared / "golden", name)
    expect_parity(case, run_case(moss, case))


def test_packed_rows_match_too(shared, moss):
    case = golden_case(shared / "golden", "video_padded")
    frames = plan_case(case.positions, case.mask, case.lengths, attend_all=True)
    frames.states = moss.encoder(case.pixels.flatten(0, 1), case.ratio_ids.flatten())
    kept = case.attention_mask.bool()
    assert not kept.all()
    logits = moss.chunks[0](PackedText(case.tokens[kept], case.lengths), frames)
    expected = case.expected["logits"][kept]
    assert (logits - expected).abs().max() < LIMITS["logits"]


def test_loading_and_exporting_gives_every_tensor_back_bit_for_bit(shared, moss):
    from safetensors.torch import load_file

    saved = load_file(shared / "golden" / "model.safetensors")
    exported = export(moss)
    assert exported.keys() == saved.keys()
    assert [name for name in saved if not torch.equal(saved[name], exported[name])] == []


def test_plain_llama_vision_matches_transformers(groups):
    case = mllama_case()
    expect_parity(case, run_case(mllama_model(ParallelConfig(), groups), case))


LAYOUTS = ("2x1", "1x2", "2x2")  # tensor x pipeline; what is left of four ranks is data parallel


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    golden = SHARED / "golden"
    out = tmp_path_factory.mktemp("golden")
    folder = str(golden) if golden.is_dir() else "-"
    return run_ranks("tests/workers/golden.py", 4, folder, *LAYOUTS, out=out)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity_holds_in_parallel_layouts(layout, layouts):
    ranks = layouts.load_all(layout)
    assert len(ranks) == 4
    for name in ranks[0]:
        case = mllama_case() if name == "mllama" else golden_case(SHARED / "golden", name)
        whole: dict[str, torch.Tensor] = {}
        for part in ranks:
            for key, value in part[name].items():  # what several ranks hold, they agree about
                torch.testing.assert_close(whole.setdefault(key, value), value)
        expect_parity(case, whole)
