"""Which kernels torch's attention may take in a pass of any length."""

from __future__ import annotations

import torch

from inference.engine.engine import Engine
from inference.engine.slots import Step
from inference.engine.unplanned_attention import unplanned_attention
from tests.inference.engine.streams import IMAGE
from tests.inference.tiny import tiny_model


def test_passes_of_any_length_take_no_kernel_that_is_planned_for_one() -> None:
    """As cuDNN's, which the tower keeps: its frames have one shape."""
    model = tiny_model(silence_token_id=7)
    planned: dict[str, set[bool]] = {"decoder": set(), "tower": set()}
    parts = {"decoder": model.model.language_model, "tower": model.model.vision_model}
    hooks = [
        layer.register_forward_hook(
            lambda *_, own=planned[name]: own.add(torch.backends.cuda.cudnn_sdp_enabled())
        )
        for name, part in parts.items()
        for layer in part.modules()
    ]
    engine = Engine(model, max_tokens=128)
    slot = engine.open()
    engine.step([Step(slot, [5, 6, IMAGE, 7], engine.encode([torch.zeros(3, 56, 56)]))])
    engine.step([Step(slot)])
    for hook in hooks:
        hook.remove()
    assert planned == {"decoder": {False}, "tower": {True}}
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_threads_that_overlap_leave_the_kernels_of_others_as_they_were() -> None:
    """The first one leaves before the second one does."""
    enter, leave = unplanned_attention.__enter__, unplanned_attention.__exit__
    for before in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(before)
        found = []
        for go in (enter, enter, leave, leave):
            go()
            found.append(torch.backends.cuda.cudnn_sdp_enabled())
        assert found == [False, False, False, before]
    torch.backends.cuda.enable_cudnn_sdp(True)
