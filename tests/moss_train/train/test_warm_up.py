"""The shapes of a step's attention have all been met before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moss_train.model import sdpa
from moss_train.model.loss import LossOptions
from moss_train.model.projector import pooled_tokens
from moss_train.parallel.distribute import read_step
from moss_train.parallel.packing import Bounds
from moss_train.parallel.schedule import plan_inputs
from moss_train.train.warm_up import plan_kernels
from tests.moss_train.model.build import random_model
from tests.workers.device import samples
from tests.workers.matrix import small_model


@pytest.mark.parametrize(("kind", "recompute"), [("mixed", "full"), ("stream", "none")])
def test_a_step_meets_no_new_shape(groups, monkeypatch, caplog, kind: str, recompute: str) -> None:
    """In bf16, in which all goes to torch's kernels; a plan is one for sizes and strides."""
    seen: list[Any] = []
    plain: Any = sdpa.scaled_dot_product_attention

    def watched(*heads: torch.Tensor, attn_mask: torch.Tensor | None, **options: Any):
        tensors = [*heads, *([] if attn_mask is None else [attn_mask])]
        seen.append((*((x.shape, x.stride()) for x in tensors), *options.values()))
        return plain(*heads, attn_mask=attn_mask, **options)

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", watched)
    model = small_model("bf16")
    model.round_lengths = "on"
    built = random_model(model, groups, recompute=recompute)
    made = samples(kind, 0, 4, 1)
    batch = read_step(made, 2, Bounds(1), 8, (1, 3, 56, 56), groups, 1)
    inputs = plan_inputs(batch.microbatches, model, 1, LossOptions(11))
    caplog.set_level("INFO")
    plan_kernels(built.chunks, inputs)
    assert "planned kernels of attention for " in caplog.text
    planned, seen[:] = set(seen), []
    assert all(p.grad is None for _, p in built.named_parameters())
    for item in inputs:
        rows = pooled_tokens(model)
        item.frames.states = torch.zeros(item.frames.count, rows, model.text.hidden_size).bfloat16()
        built.chunks[0](item.text, item.frames, item.targets, torch.tensor(5.0)).backward()
    assert seen
    assert set(seen) <= planned
