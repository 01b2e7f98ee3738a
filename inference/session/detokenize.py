"""Tokens to text, piece by piece: each token is looked at once, however long the text gets."""

from __future__ import annotations

import codecs

from tokenizers import Tokenizer, decoders


class TextStream:
    """The text of tokens as they come, without special tokens.

    A piece ends where a character does. Bytes that cannot become a character any more are U+FFFD at
    once; a character that never gets its last bytes is left out. The text is that of
    `Tokenizer.decode`, which writes a U+FFFD for such an end.

    Raises:
        ValueError: the tokenizer does not write bytes, as Llama-3's does.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            found = type(tokenizer.decoder).__name__
            raise ValueError(f"the tokenizer's decoder is {found}: needed is ByteLevel, of Llama-3")
        self._tokenizer = tokenizer
        self._special = special_tokens(tokenizer)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def append(self, token: int) -> str:
        """Takes a token and returns the text that it completes, often none."""
        written = None if token in self._special else self._tokenizer.id_to_token(token)
        return "" if written is None else self._decoder.decode(_bytes(written))


def special_tokens(tokenizer: Tokenizer) -> set[int]:
    """Ids of the tokens that are no text."""
    added = tokenizer.get_added_tokens_decoder()
    return {number for number, token in added.items() if token.special}


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """What a token is in bytes: of a special one its name; of a number without a token nothing."""
    return _bytes(tokenizer.id_to_token(token) or "")


def _alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    own = {chr(byte): byte for byte in printable}
    return own | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTES = _alphabet()


def _bytes(written: str) -> bytes:
    """The bytes of a token as a vocabulary writes it; an added token may be written as text."""
    try:
        return bytes(_BYTES[character] for character in written)
    except KeyError:
        return written.encode()
