"""A tiny model as `save_pretrained` leaves it: weights, tokenizer, processor, code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.inference.tiny import save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model with random weights in which no gate is zero."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))
