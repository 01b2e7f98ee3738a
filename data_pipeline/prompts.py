"""From a conversation to tokens, labels and the positions of its frames.

A prompt has one of three forms:

- `pretrain`: the contents one after the other, between begin and end of text. Loss on the
  assistant's contents.
- `chat`: Llama-3's turns with headers. Loss on the assistant's contents and their `<|eot_id|>`.
- `realtime`: as `chat`, one frame for each mark. No loss on `<|eot_id|>`: the user ends the model's
  turn by speaking.

The `<|image|>` of a frame never has a loss. `<|silence|>` has a label like any other token; the
loss gives it a smaller weight (`stage.silence_weight`).

In training, a real-time frame that arrives while the model speaks may swap places with the token
before it (`Prompt.swap_frames`): a camera does not wait for the end of a word.
"""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tokenizers import Tokenizer

from data_pipeline.batch import IGNORED_LABEL
from data_pipeline.schema import IMAGE_MARK, MARK, VIDEO_MARK, Message, Role, SampleError
from data_pipeline.tokens import SpecialTokens

PromptForm = Literal["pretrain", "chat", "realtime"]
# The form by the name of the training stage, for runs and exports that do not say it.
STAGE_FORMS: dict[str | None, PromptForm] = {
    "pt1": "pretrain",
    "pt2": "pretrain",
    "sft": "chat",
    "realtime_sft": "realtime",
}


def trained_form(stage: str | None, prompt: str, named_stage: str | None = None) -> str | None:
    """The form of the prompts that a run's weights know; None: unknown.

    Args:
        stage, prompt: the run's `stage.name` and `stage.prompt`; None: its training is not known.
        named_stage: the stage that a user names in place of the run's.
    """
    if named_stage is not None and (named_stage in STAGE_FORMS or named_stage != stage):
        return STAGE_FORMS.get(named_stage)
    # Runs of earlier versions say `chat` of this stage, though they learn streams.
    if stage is None or (stage, prompt) == ("realtime_sft", "chat"):
        return STAGE_FORMS.get(stage)
    return prompt


# Special tokens that a content may contain; any other one that it spells is text.
_CONTENT = re.compile(r"(<\|image\|>|<\|video\|>|<\|silence\|>|<\|\.\.\.\|>)")
_SPELLING = threading.Lock()  # a tokenizer's setting, which threads of a server share
TYPED = "\ufdd0"  # no character: Unicode keeps it for a program's own use


def as_typed(text: str) -> str:
    """A text for a content in which nothing has a meaning, marks and `<|silence|>` neither: what
    people write is told apart from what a program puts beside it."""
    return text.replace("<|", f"<{TYPED}|")


def as_system(text: str) -> str:
    """A system prompt for a content: `<|silence|>` and `<|...|>` are those of training, whose
    records speak of them there; there is nothing to show, so marks of media are text."""
    return MARK.sub(lambda mark: as_typed(mark.group()), text)


@dataclass
class Prompt:
    """S tokens and their labels (unshifted), and the index in them of each of the F frames."""

    tokens: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    frame_positions: list[int] = field(default_factory=list)
    swappable: list[int] = field(default_factory=list)  # of the F: numbers of those that may swap
    truncated: bool = False
    truncated_labels: int = 0

    def add(self, tokens: Sequence[int], *, learn: bool) -> None:
        """Appends tokens; with `learn` they are labels, too."""
        self.tokens += tokens
        self.labels += tokens if learn else [IGNORED_LABEL] * len(tokens)

    def add_frames(self, count: int, image_token: int) -> None:
        self.frame_positions += range(len(self.tokens), len(self.tokens) + count)
        self.add([image_token] * count, learn=False)

    def swap_frames(self, probability: float, draws: random.Random) -> None:
        """Each swappable frame changes places with the token before it with `probability`.

        No two swaps touch the same token: the one before a swappable frame is never a frame.
        """
        for number in self.swappable:
            if draws.random() < probability:
                position = self.frame_positions[number]
                for values in (self.tokens, self.labels):
                    values[position - 1], values[position] = values[position], values[position - 1]
                self.frame_positions[number] -= 1

    def cut(self, length: int) -> None:
        """Keeps the first `length` tokens and exactly the frames whose marks are among them."""
        self.truncated = len(self.tokens) > length
        self.truncated_labels = _count_labels(self.labels[length:])
        del self.tokens[length:]
        del self.labels[length:]
        self.frame_positions = [p for p in self.frame_positions if p < length]
        self.swappable = [number for number in self.swappable if number < len(self.frame_positions)]


class PromptBuilder:
    """Holds a tokenizer and turns conversations into prompts."""

    def __init__(self, tokenizer: Tokenizer, special: SpecialTokens) -> None:
        self._tokenizer = tokenizer
        self._special = special
        added = tokenizer.get_added_tokens_decoder()
        self._control = {i for i, token in added.items() if token.special}
        self._inline = {"<|silence|>": special.silence, "<|...|>": special.ellipsis}
        self._headers: dict[str, list[int]] = {}  # by role: each is the same in every prompt

    def build(
        self,
        messages: Sequence[Message],
        frames_per_mark: Sequence[int],
        *,
        form: PromptForm,
        sequence_length: int,
        swap_probability: float = 0.0,
        draws: random.Random | None = None,
    ) -> Prompt:
        """Builds the prompt, cut to `sequence_length` tokens.

        `frames_per_mark` holds the number of frames of each media mark in reading order. After a
        cut only the first `len(prompt.frame_positions)` frames are still in use. Swappable frames
        swap with `swap_probability`, decided by `draws` (None: no swaps, as in evaluation). Raises
        SampleError where nothing is left to learn.
        """
        prompt = self._conversation(messages, frames_per_mark, form)
        if form == "pretrain":
            prompt.add([self._special.end_of_text], learn=False)
        if draws is not None:
            prompt.swap_frames(swap_probability, draws)
        prompt.cut(sequence_length)
        if not _count_labels(prompt.labels):
            raise _nothing_to_learn(prompt, sequence_length)
        return prompt

    def question(
        self,
        messages: Sequence[Message],
        frames_per_mark: Sequence[int],
        form: PromptForm,
        *,
        unfinished: bool = False,
    ) -> Prompt:
        """As `build`, without labels, up to the place where the assistant is to go on: at the start
        of an answer, or inside the last message, the assistant's own, if that is `unfinished`."""
        prompt = self._conversation(messages, frames_per_mark, form)
        if unfinished and form != "pretrain":
            del prompt.tokens[-1], prompt.labels[-1]  # <|eot_id|>
        elif form != "pretrain":
            prompt.add(self.header("assistant"), learn=False)
        return prompt

    def watched(self, frames: int, prompt: str, system_prompt: str = "") -> list[int]:
        """The transcript of a stream, one `<|image|>` a frame, on which the assistant has said
        nothing and is asked now, up to the place of its answer."""
        special = self._special
        before = self.turn("system", system_prompt) if system_prompt else []
        stream = [special.image, special.silence] * frames
        return [
            *(special.begin_of_text, *before, *self.turn("user", ""), *self.header("assistant")),
            *(*stream, special.eot_id, *self.turn("user", prompt), *self.header("assistant")),
        ]

    def header(self, role: Role) -> list[int]:
        """The tokens before a turn's content."""
        special = self._special
        if role not in self._headers:
            inside = [*self._encode(role), special.end_header_id, *self._encode("\n\n")]
            self._headers[role] = [special.start_header_id, *inside]
        return list(self._headers[role])

    def turn(self, role: Role, text: str) -> list[int]:
        """A whole turn without media and its `<|eot_id|>`; what is not a system prompt is typed by
        people (`as_typed`)."""
        prompt = Prompt()
        content = as_system(text) if role == "system" else as_typed(text)
        self._add_content(prompt, content, iter(()), learn=False)
        return [*self.header(role), *prompt.tokens, self._special.eot_id]

    def _conversation(
        self, messages: Sequence[Message], frames_per_mark: Sequence[int], form: PromptForm
    ) -> Prompt:
        """The begin of text, and all messages. Raises SampleError: other media than marks."""
        prompt, counts = Prompt(), iter(frames_per_mark)
        prompt.add([self._special.begin_of_text], learn=False)
        for message in messages:
            self._add_message(prompt, message, counts, form)
        if next(counts, None) is not None:
            raise SampleError("mark_media_mismatch", "more media than marks")
        return prompt

    def _add_message(
        self, prompt: Prompt, message: Message, counts: Iterator[int], form: PromptForm
    ) -> None:
        learn = message.role == "assistant" and message.learn
        if form == "pretrain":
            self._add_content(prompt, message.content, counts, learn)
            return
        special = self._special
        prompt.add(self.header(message.role), learn=False)
        start, frames = len(prompt.tokens), len(prompt.frame_positions)
        self._add_content(prompt, message.content, counts, learn)
        if learn and form == "realtime":
            prompt.swappable += self._swappable(prompt, start, frames)
        prompt.add([special.eot_id], learn=learn and form == "chat")

    def _swappable(self, prompt: Prompt, start: int, first: int) -> list[int]:
        """Numbers of the frames, from `first` on, that arrive while the model speaks.

        These have a word before them, and are not among the first two tokens of the content, which
        starts at `start`.
        """
        unmoved = (self._special.image, self._special.silence)
        return [
            number
            for number, position in enumerate(prompt.frame_positions[first:], first)
            if position >= start + 2 and prompt.tokens[position - 1] not in unmoved
        ]

    def _add_content(
        self, prompt: Prompt, content: str, counts: Iterator[int], learn: bool
    ) -> None:
        for piece in _CONTENT.split(content):
            if piece in (IMAGE_MARK, VIDEO_MARK):
                count = next(counts, None)
                if count is None:
                    raise SampleError("mark_media_mismatch", "more marks than media")
                prompt.add_frames(count, self._special.image)
            elif piece in self._inline:
                prompt.add([self._inline[piece]], learn=learn)
            elif piece:
                prompt.add(self._encode(piece), learn=learn)

    def _encode(self, text: str) -> list[int]:
        text = text.replace(TYPED, "")
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
            if self._control.intersection(ids):
                ids = self._encode_spelled(text)
        except TypeError:  # JSON can spell half a surrogate pair, UTF-8 cannot
            raise SampleError(
                "bad_text", f"{text!r:.80} contains half a surrogate pair: write whole characters"
            ) from None
        return ids

    def _encode_spelled(self, text: str) -> list[int]:
        """A special token that a text spells stays text: it ends no turn and forges no header."""
        with _SPELLING:
            self._tokenizer.encode_special_tokens = True
            try:
                ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
            finally:
                self._tokenizer.encode_special_tokens = False
        return ids


def _count_labels(labels: Sequence[int]) -> int:
    return len(labels) - labels.count(IGNORED_LABEL)


def _nothing_to_learn(prompt: Prompt, sequence_length: int) -> SampleError:
    if not prompt.truncated_labels:
        return SampleError("no_labels", "no assistant's turn has a token to learn")
    return SampleError(
        "cut_before_answer",
        f"the assistant's first token comes after {sequence_length} tokens, where the sample is cut"
        ": raise data.sequence_length",
    )
