"""What makes two tokenizers the same for a model's weights, and what another one is called."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, processors

from data_pipeline.tokenizer_identity import TokenizerIdentity, identify
from data_pipeline.tokens import build_toy_tokenizer, load_tokenizer

TEXTS = ("a man walks a dog", "the dog sees the man", "what is in the picture?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_toy_tokenizer(tmp_path_factory.mktemp("one"), TEXTS, 300)


def with_library(change: Callable[[Tokenizer], Any]) -> Callable[[Path, Path], None]:
    def write(source: Path, out: Path) -> None:
        tokenizer = load_tokenizer(source)
        change(tokenizer)
        tokenizer.save(str(out / "tokenizer.json"))

    return write


def with_json(change: Callable[[dict[str, Any]], Any], indent: int | None = 2):
    def write(source: Path, out: Path) -> None:
        plain = json.loads((source / "tokenizer.json").read_text())
        change(plain)
        (out / "tokenizer.json").write_text(json.dumps(plain, indent=indent, ensure_ascii=True))

    return write


def merges_as_text(plain: dict[str, Any]) -> None:
    """As files of tokenizers before 0.20 have them."""
    plain["model"]["merges"] = [" ".join(pair) for pair in plain["model"]["merges"]]
    for new in ("ignore_merges", "byte_fallback"):
        plain["model"].pop(new)


def reversed_vocabulary(plain: dict[str, Any]) -> None:
    plain["model"]["vocab"] = dict(reversed(plain["model"]["vocab"].items()))


SAME = {
    "form of the file": with_json(lambda plain: None, indent=None),
    "order of the vocabulary": with_json(reversed_vocabulary),
    "form of the merges": with_json(merges_as_text),
    "truncation": with_library(lambda tokenizer: tokenizer.enable_truncation(5)),
    "padding": with_library(lambda tokenizer: tokenizer.enable_padding(length=9)),
    "what stands around a text": with_library(
        lambda tokenizer: setattr(tokenizer, "post_processor", processors.ByteLevel())
    ),
}


def swap_words(plain: dict[str, Any]) -> None:
    vocabulary = plain["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def swap_special(plain: dict[str, Any]) -> None:
    """<|silence|> and <|image|> change places."""
    tokens = {token["content"]: token for token in plain["added_tokens"]}
    silence, image = tokens["<|silence|>"], tokens["<|image|>"]
    silence["content"], image["content"] = image["content"], silence["content"]


def normalize(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Lowercase()


OTHER = {
    "a word's id": (with_json(swap_words), "other vocabulary, merges or normalizer"),
    "a merge": (
        with_json(lambda plain: plain["model"]["merges"].reverse()),
        "other vocabulary, merges or normalizer",
    ),
    "normalizer": (with_library(normalize), "other vocabulary, merges or normalizer"),
    "ids of special tokens": (
        with_json(swap_special),
        "<|silence|> is 300, not 297, <|image|> is 297, not 300",
    ),
    "one token more": (
        with_library(lambda t: t.add_special_tokens([AddedToken("<|more|>", special=True)])),
        "other added tokens, 302 tokens, not 301",
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_the_form_of_the_file_does_not_count(folder, tmp_path, name):
    SAME[name](folder, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() != (folder / "tokenizer.json").read_bytes()
    one, other = identify(folder), identify(tmp_path)
    assert other.digest == one.digest
    assert other.differences(one) == ""


@pytest.mark.parametrize("name", OTHER)
def test_what_changes_an_id_s_meaning_is_another_tokenizer_and_is_named(folder, tmp_path, name):
    write, said = OTHER[name]
    write(folder, tmp_path)
    one, other = identify(folder), identify(tmp_path)
    assert other.differences(one) == f"digest {other.digest}, not {one.digest}: {said}"
    assert other.extends(one) == (name == "one token more")


def test_a_file_that_is_written_anew_is_read_anew(folder, tmp_path):
    SAME["truncation"](folder, tmp_path)
    before = identify(tmp_path)
    build_toy_tokenizer(tmp_path, ["other words, other merges"], 300)
    assert identify(tmp_path).digest != before.digest


def test_what_is_saved_is_read_back(folder):
    one = identify(folder)
    assert TokenizerIdentity.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    with pytest.raises(ValueError, match="does not exist"):
        identify(folder / "none")
