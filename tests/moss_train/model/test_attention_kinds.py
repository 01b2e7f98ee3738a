"""A model on each kind of attention, against sdpa's losses and gradients; the packages' stand-ins
refuse what the real ones do."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from data_pipeline import flash
from tests.conftest import REPO
from tests.moss_train.model.numbers import DENSE, PACKED, TINY, compare
from tests.stand_ins import stand_in

CROSS = len(TINY.text.cross_attention_layers)
LAYERS = TINY.text.num_layers - CROSS
TOWER = TINY.vision.num_layers + TINY.vision.num_global_layers


@pytest.mark.parametrize("layout", [PACKED, DENSE])
@pytest.mark.parametrize("release", ["flash_attn_2", "flash_attn_4"])
def test_flash_gives_what_sdpa_does(groups, release, layout, monkeypatch):
    module = stand_in(monkeypatch, release, OTHER_DTYPES=True)
    compare(groups, "flash", layout)
    assert module.calls.count("packed") == LAYERS
    # And the block of each cross-attention in which all see the same frames.
    assert module.calls.count("whole") == TOWER + CROSS


def test_transformer_engine_gives_what_sdpa_does():
    """Through megatron-core's own class for it."""
    command = [sys.executable, "-m", "tests.workers.te_attention"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{{'sbhd': {TOWER}, 'thd': {LAYERS}}}\n"


@pytest.mark.parametrize("release", ["flash_attn_2", "flash_attn_4"])
def test_flash_attn_s_stand_ins_refuse_what_the_real_ones_do(release, monkeypatch):
    stand_in(monkeypatch, release)
    calls = flash.load()
    q, kv = torch.zeros(2, 3, 4, 16).bfloat16(), torch.zeros(2, 5, 2, 16).bfloat16()
    out, sums = calls.whole(q, kv, kv, True)
    assert out.shape == q.shape
    assert sums.shape == (2, 4, 3)
    assert sums.dtype == torch.float32
    bounds = torch.tensor([0, 2, 3], dtype=torch.int32)
    assert calls.packed(q[0], kv[0, :3], kv[0, :3], bounds, 2).shape == q[0].shape
    refused = RuntimeError if release == "flash_attn_2" else AssertionError
    for wrong in (
        (q.float(), kv.float(), kv.float()),
        (q, kv.half(), kv),
        (q[:, :, :3], kv, kv),
        (q.repeat(1, 1, 1, 17), *2 * [kv.repeat(1, 1, 1, 17)]),
    ):
        with pytest.raises(refused):
            calls.whole(wrong[0], wrong[1], wrong[2], False)
    for at in (bounds.long(), bounds[:2], bounds.repeat_interleave(2)[::2]):
        with pytest.raises(refused):
            calls.packed(q[0], kv[0, :3], kv[0, :3], at, 2)
