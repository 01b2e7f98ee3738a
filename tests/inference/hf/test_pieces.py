"""A product over many keys, cut into pieces."""

from __future__ import annotations

import pytest
import torch

from inference.hf.decoder_moss_video import PIECE, sum_in_pieces


@pytest.mark.parametrize("keys", [7, PIECE, 3 * PIECE, 3 * PIECE + 5])
def test_pieces_sum_to_the_product(keys: int) -> None:
    generator = torch.Generator().manual_seed(keys)
    weights = torch.randn(2, 3, 4, keys, dtype=torch.float64, generator=generator).softmax(-1)
    v = torch.randn(2, 3, keys, 16, dtype=torch.float64, generator=generator)
    wanted = weights @ v
    got = sum_in_pieces(weights.float(), v.float())
    torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=0)
    # bf16: the sum over pieces rounds no more than one product does.
    rounded = sum_in_pieces(weights.bfloat16(), v.bfloat16())
    exact = weights.bfloat16().double() @ v.bfloat16().double()
    assert rounded.dtype is torch.bfloat16
    torch.testing.assert_close(rounded.double(), exact, atol=2**-8, rtol=2**-7)
