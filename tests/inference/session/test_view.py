"""What a terminal shows of a session."""

from __future__ import annotations

import io
import re

from tokenizers import Tokenizer

from inference.session.view import View
from tests.inference.session.scripted import started


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_silence_is_one_line_that_is_updated(tokenizer: Tokenizer, words: list[int]) -> None:
    model, out = started(tokenizer), Terminal()
    for second in range(3):
        model.frame(float(second))
        model.step(model.special.silence)
    model.frame(3.0)
    model.say([*words, model.special.silence])
    view = View(out)
    for event in model.session.log.after(0):
        view.show(event)
    shown = re.sub(r"\x1b\[2m|\x1b\[0m", "", out.getvalue())
    silence, speech = shown.split("\n")[:2]
    assert [part[:11] for part in silence.split("\r\x1b[K")[1:]] == [
        "00:00  ·  l", "00:00-00:01", "00:00-00:02",
    ]  # fmt: skip
    assert speech.startswith(f"00:03  {tokenizer.decode(words)}  (4 tokens/s")
