from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from data_pipeline.tokens import SpecialTokens, build_toy_tokenizer, load_tokenizer


@pytest.mark.parametrize("texts", [["a b"], [f"word{i} and so on" for i in range(2000)]])
def test_ids_stay_in_place_whatever_the_texts(tmp_path: Path, texts: list[str]) -> None:
    tokenizer = load_tokenizer(build_toy_tokenizer(tmp_path, texts, vocab_size=512))
    special = SpecialTokens.from_tokenizer(tokenizer)
    assert special.image == 512
    assert tokenizer.get_vocab_size() == 513
    assert sorted(vars(special).values()) == list(range(503, 513))
    text = "Ünïcode <|silence|>\n\n日本 word7 <|image|>"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_transformers_reads_the_same_ids(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer(build_toy_tokenizer(tmp_path, ["A red circle moves."]))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "<|begin_of_text|>A red circle<|image|><|...|><|eot_id|>"
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text).ids
    special = SpecialTokens.from_tokenizer(ours)
    assert theirs.pad_token_id == special.pad
    assert (theirs.bos_token_id, theirs.eos_token_id) == (
        special.begin_of_text,
        special.end_of_text,
    )


def test_settings_of_cutting_and_padding_in_the_file_are_no_settings_of_ours(tmp_path) -> None:
    """Tools that save a tokenizer after a call leave its settings in tokenizer.json."""
    transformers = pytest.importorskip("transformers")
    plain = load_tokenizer(build_toy_tokenizer(tmp_path, ["A red circle moves."]))
    text = "A red circle moves away from the blue square"
    wanted = plain.encode(text).ids
    plain.enable_truncation(4)
    plain.enable_padding(length=6)
    plain.save(str(tmp_path / "tokenizer.json"))
    assert len(plain.encode(text).ids) == 6
    assert load_tokenizer(tmp_path).encode(text).ids == wanted
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode(text, add_special_tokens=False) == wanted


def test_a_missing_token_is_named() -> None:
    tokenizer = Tokenizer(BPE())
    with pytest.raises(ValueError, match=r"llama has no token .*<\|silence\|>, <\|\.\.\.\|>"):
        SpecialTokens.from_tokenizer(tokenizer, "llama")


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer.json does not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_too_small_for_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size: 200"):
        build_toy_tokenizer(tmp_path, ["a"], vocab_size=200)
