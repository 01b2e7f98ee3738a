"""The tokenizer of the tests of sessions."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from data_pipeline.tokens import build_toy_tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = ["A man walks in and sits down. Who is it? He is Bob. Be brief."]
    return load_tokenizer(build_toy_tokenizer(tmp_path_factory.mktemp("tokenizer"), texts))


@pytest.fixture
def words(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode("A man walks in", add_special_tokens=False).ids
