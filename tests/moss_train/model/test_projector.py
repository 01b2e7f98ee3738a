"""Pooling of the patch grid against formulas written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moss_train.model.projector import Projector, pooled_tokens
from moss_train.model.vision import concatenate_states
from moss_train.model_config import ProjectorConfig
from tests.moss_train.model.build import preset

STRIDE = 2


def pooled(mode: str) -> tuple[Projector, Tensor, Tensor]:
    """A projector of this mode, what it projects, and the unpooled features `[N, T, P, D]`."""
    torch.manual_seed(0)
    model = preset("tiny", projector=ProjectorConfig(mode, STRIDE))
    projector = Projector(model, torch.float32)
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    size = (3, 2, model.vision.num_patches, model.vision.hidden_size)
    final, *states = (torch.randn(size) for _ in range(4))
    out = projector(projector.pool_states(final, states))
    tokens = pooled_tokens(model)
    assert out.shape == (3, 2 * tokens, model.text.hidden_size)
    return projector, out, concatenate_states(final, states)


def squares(features: Tensor) -> Tensor:
    """Patch grid cut into squares: `[N, T, g, g, STRIDE (row), STRIDE (column), D]`."""
    grid = features[:, :, 1:].unflatten(2, (2, STRIDE, 2, STRIDE))
    return grid.transpose(3, 4)


def project(projector: Projector, features: Tensor, grid: Tensor) -> Tensor:
    """The class token and the pooled grid `[N, T, g, g, D]` through the linear projector."""
    tokens = torch.cat((features[:, :, :1], grid.flatten(2, 3)), dim=2)
    return (tokens @ projector.linear.weight.T + projector.linear.bias).flatten(1, 2)


@pytest.mark.parametrize(
    ("mode", "pool"),
    [
        ("average", lambda x: x.mean((4, 5))),
        ("max", lambda x: x.amax((4, 5))),
        ("bilinear", lambda x: x.mean((4, 5))),  # at half the size: the mean of 2 x 2
    ],
)
def test_pooling_each_state_equals_pooling_their_concatenation(mode, pool):
    projector, out, features = pooled(mode)
    expected = project(projector, features, pool(squares(features)))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_channel_fusion_mixes_the_channels_of_a_square():
    projector, out, features = pooled("channel_fusion")
    assert projector.merge is not None
    assert projector.merge.bias is None
    mixed = torch.einsum("ntgjrcd,edrc->ntgje", squares(features), projector.merge.weight)
    expected = project(projector, features, mixed)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_no_pooling_keeps_every_patch():
    torch.manual_seed(0)
    model = preset("tiny", projector=ProjectorConfig("none", 1))
    projector = Projector(model, torch.float32)
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    final = torch.randn(1, 1, model.vision.num_patches, model.vision.hidden_size)
    states = [torch.randn_like(final) for _ in range(3)]
    features = concatenate_states(final, states)
    assert torch.equal(projector.pool_states(final, states), features)
    assert pooled_tokens(model) == 17


def test_intermediate_states_are_concatenated_channel_major():
    final = torch.tensor([[1.0, 2.0]])
    states = [torch.tensor([[10.0, 20.0]]), torch.tensor([[30.0, 40.0]])]
    expected = torch.tensor([[1.0, 2.0, 10.0, 30.0, 20.0, 40.0]])
    assert torch.equal(concatenate_states(final, states), expected)


def test_11b_sees_101_vision_tokens_a_frame():
    assert pooled_tokens(preset("11b")) == 101
