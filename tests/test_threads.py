"""Tests share the cores: none begins with the threads that another one has asked for."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("turn", ["first", "next"])
def test_each_test_begins_with_one_thread(turn: str) -> None:
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)
