"""The tokenizer: its special tokens by name, loading one, training the toy one.

An HF tokenizer folder is read through its `tokenizer.json` alone: the ids are those of
transformers' fast tokenizers, without importing transformers in every data worker.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_pipeline.files import NOT_FETCHED, is_lfs_pointer


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens, looked up in a tokenizer by their text."""

    begin_of_text: int
    end_of_text: int
    start_header_id: int
    end_header_id: int
    eot_id: int
    finetune_right_pad_id: int
    silence: int
    ellipsis: int
    video: int
    image: int

    @property
    def pad(self) -> int:
        return self.finetune_right_pad_id

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, source: str = "the tokenizer") -> SpecialTokens:
        """Looks every token up; raises ValueError that names all that are missing."""
        looked_up = {
            field.name: tokenizer.token_to_id(token_text(field.name)) for field in fields(cls)
        }
        ids = {name: token for name, token in looked_up.items() if token is not None}
        missing = [token_text(name) for name in looked_up if name not in ids]
        if missing:
            raise ValueError(
                f"{source} has no token {', '.join(missing)}: use a Llama-3.2-Vision tokenizer "
                "with the tokens of MOSS-Video added, or the toy tokenizer"
            )
        return cls(**ids)


def token_text(name: str) -> str:
    """The text of a SpecialTokens field: `eot_id` -> `<|eot_id|>`."""
    return "<|...|>" if name == "ellipsis" else f"<|{name}|>"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Opens an HF tokenizer folder (or its tokenizer.json); ValueError names what is missing.

    What other tools saved in the file of cutting and padding texts is left out, as transformers
    leaves it out: they are settings of a call.
    """
    file = Path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"tokenizer: {file} does not exist: give a folder with a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises nothing narrower
        if is_lfs_pointer(file):
            raise ValueError(f"tokenizer: {file} {NOT_FETCHED}") from None
        raise ValueError(f"tokenizer: {file} cannot be read: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def build_toy_tokenizer(out_dir: str | Path, texts: Iterable[str], vocab_size: int = 512) -> Path:
    """Trains a byte-level BPE on `texts` and saves it as an HF tokenizer folder.

    As in Llama-3.2-Vision, all tokens that the head can say have ids below `vocab_size`, and
    `<|image|>` is the first id after them: an embedding row without a row in the head.
    """
    inside = [token_text(f.name) for f in fields(SpecialTokens) if f.name != "image"]
    smallest = 256 + len(inside)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size: {vocab_size} is too small: bytes and tokens need {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(inside),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # A small corpus may not fill the vocabulary: reserved tokens do, so that ids stay in place.
    free = vocab_size - len(inside) - tokenizer.get_vocab_size()
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(free)]
    everything = [*reserved, *inside, token_text("image")]
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in everything]
    )
    assert tokenizer.token_to_id(token_text("image")) == vocab_size
    return _save_hf(tokenizer, Path(out_dir))


def _save_hf(tokenizer: Tokenizer, out_dir: Path) -> Path:
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out_dir / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token_text("begin_of_text"),
        "eos_token": token_text("end_of_text"),
        "pad_token": token_text("finetune_right_pad_id"),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (out_dir / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return out_dir
