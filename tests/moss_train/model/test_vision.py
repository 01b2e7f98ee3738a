"""The rows that pad a tile: one computed, in place of all of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moss_train.model.vision import rows_of_tile
from tests.moss_train.model.build import preset, random_model


@pytest.mark.parametrize("full_attention", [True, False])
@pytest.mark.parametrize("tiles", [1, 2])
def test_one_row_stands_for_all_padding_of_a_tile(groups, full_attention, tiles) -> None:
    """With each of the seven rows computed, states and gradients are the same."""
    tiny = preset("tiny")
    model = replace(tiny, vision=replace(tiny.vision, full_attention=full_attention))
    tower = random_model(model, groups).encoder.vision
    assert (tower.rows, tower.copies) == (18, 7)
    side = model.vision.image_size
    pixels = torch.randn(3, tiles, 3, side, side, generator=torch.Generator().manual_seed(0))
    ratio_ids = torch.tensor([0, 1, 1] if tiles == 1 else [0, 1, 5])
    parameters = [p for p in tower.parameters() if p.requires_grad]
    results = []
    for tower.rows, tower.copies in ((18, 7), (24, 1)):
        final, states = tower(pixels, ratio_ids)
        loss = final.square().mean() + sum(state.square().mean() for state in states)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        results.append((final, *states, *(g for g in gradients if g is not None)))
    for few, all_rows in zip(*results, strict=True):
        torch.testing.assert_close(few, all_rows, rtol=1e-4, atol=1e-5)
    assert results[0][0].std() > 0.1


def test_states_come_in_the_order_of_their_layers(groups) -> None:
    """As transformers joins them: the projector's columns belong to them in this order."""
    tower = random_model(preset("tiny"), groups).encoder.vision
    side, layers = tower.vision.image_size, tower.vision.intermediate_layers
    assert len(layers) > 1
    pixels = torch.randn(1, 1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, states = tower(pixels, torch.tensor([1]))
        tower.vision = replace(tower.vision, intermediate_layers=layers[::-1])
        _, turned = tower(pixels, torch.tensor([1]))
    assert all(torch.equal(a, b) for a, b in zip(states, reversed(turned), strict=True))
    assert not torch.equal(states[0], states[1])


@pytest.mark.parametrize(
    ("name", "attention", "expected"),
    [
        ("tiny", "sdpa", (18, 7)),
        ("tiny", "flash", (24, 1)),  # a kernel that takes no mask
        ("11b", "sdpa", (1608, 1)),  # 7 rows of 1,608 are not worth one
    ],
)
def test_padding_is_one_row_where_that_saves_something(name, attention, expected) -> None:
    assert rows_of_tile(preset(name).vision, attention) == expected
