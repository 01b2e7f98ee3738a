"""Greedy generation for many conversations at once, each at its own pace.

A conversation is a script: text that is given, frames that arrive, and places where the model
speaks. At toy size every token is a new pass over the whole conversations, without a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from data_pipeline.batch import IGNORED_LABEL
from data_pipeline.schema import VIDEO_MARK, Sample
from moss_train.evaluate.controls import Model, ModelInput, ShownSample
from moss_train.evaluate.items import Item

SPEAK = "speak"  # the model's turn, until it ends it or has said enough
Step = str | list[int] | int  # SPEAK, tokens that are given, or the `<|image|>` token of a frame


@dataclass
class GeneratedConversation:
    """A conversation while it is generated; `utterances` are the tokens of each SPEAK."""

    script: list[Step]
    states: Tensor
    ratios: Tensor
    ends: set[int]  # tokens that end a SPEAK
    most: int  # tokens of a SPEAK
    blind: bool = False
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    utterances: list[list[int]] = field(default_factory=list)

    @property
    def input(self) -> ModelInput:
        """All of it so far."""
        return ModelInput(self.tokens, self.positions, self.states, self.ratios)

    def advance(self) -> bool:
        """Plays the script up to a token that the model has to say; False: it is over."""
        while self.script:
            step = self.script[0]
            if step == SPEAK:
                return True
            self.script.pop(0)
            if isinstance(step, int):
                if not self.blind:
                    self.positions.append(len(self.tokens))
                self.tokens.append(step)
            else:
                assert isinstance(step, list)
                self.tokens += step
            if self.script and self.script[0] == SPEAK:
                self.utterances.append([])
        return False

    def append(self, token: int) -> None:
        """Takes the model's next token."""
        self.tokens.append(token)
        self.utterances[-1].append(token)
        if token in self.ends or len(self.utterances[-1]) >= self.most:
            self.script.pop(0)


def generate(model: Model, talks: Sequence[GeneratedConversation]) -> None:
    """Plays all talks to their end, the most likely token at a time."""
    running = [talk for talk in talks if talk.advance()]
    while running:
        following = model.next_tokens([talk.input for talk in running])
        for talk, token in zip(running, following, strict=True):
            talk.append(token)
        running = [talk for talk in running if talk.advance()]


def answers(model: Model, watched: Sequence[ShownSample], most: int = 64) -> list[str]:
    """What the model says in the last turn of each conversation, in place of its answer, in at most
    `most` tokens or as many as the answer has."""
    special, talks = model.encoder.special, []
    ends = {special.eot_id, special.end_of_text}
    for sample in watched:
        tokens, start = sample.item.encoded.tokens, answer_start(sample.item)
        script = [*script_of(tokens[:start].tolist(), special.image), SPEAK]
        longest = max(most, len(tokens) - start)
        talks.append(
            GeneratedConversation(script, sample.states, sample.ratios, ends, longest, sample.blind)
        )
    generate(model, talks)
    return [model.tokenizer.decode(talk.utterances[-1]) for talk in talks]


def answer_start(item: Item) -> int:
    """Index of the first token of the last turn's answer."""
    labels = item.encoded.labels != IGNORED_LABEL
    after = (~labels).nonzero()[:, 0]
    last = int(labels.nonzero()[-1])
    return int(after[after < last].max()) + 1


def script_of(tokens: Sequence[int], image: int) -> list[Step]:
    """Tokens that are given as a script, frame by frame."""
    script: list[Step] = [[]]
    for token in tokens:
        if token == image:
            script += [image, []]
        else:
            assert isinstance(script[-1], list)
            script[-1].append(token)
    return script


def streams(
    model: Model, watched: Sequence[ShownSample], most: int = 10
) -> list[list[tuple[int, str]]]:
    """Plays real-time conversations live; what was said in which second, -1 before any frame.

    A sentence that goes on after a frame counts for the second in which it began. `most` tokens
    fit in a second. An answer to a question belongs to the second of the frame before it.
    """
    ends = {model.encoder.special.silence}
    talks = [
        GeneratedConversation(
            stream_script(model, sample.item.sample),
            sample.states,
            sample.ratios,
            ends,
            most,
            sample.blind,
        )
        for sample in watched
    ]
    seconds = [_seconds(talk.script) for talk in talks]
    generate(model, talks)
    return [
        _utterances(model, talk.utterances, second)
        for talk, second in zip(talks, seconds, strict=True)
    ]


def stream_script(model: Model, sample: Sample) -> list[Step]:
    """The user's turns and the frames of a real-time sample; the model speaks after each frame,
    and where the sample answers before one.
    """
    special, tokenizer = model.encoder.special, model.tokenizer

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    script: list[Step] = [[special.begin_of_text]]
    for message in sample.messages:
        header = [special.start_header_id, *encode(message.role), special.end_header_id]
        script.append([*header, *encode("\n\n")])
        if message.role != "assistant":
            script.append([*encode(message.content), special.eot_id])
            continue
        before, *frames = message.content.split(VIDEO_MARK)
        script += [SPEAK] if before else []
        for _ in frames:
            script += [special.image, SPEAK]
        script.append([special.eot_id])
    return script


def _seconds(script: Sequence[Step]) -> list[int]:
    """The second of each SPEAK of a script."""
    second, seconds = -1, []
    for step in script:
        if isinstance(step, int):
            second += 1
        elif step == SPEAK:
            seconds.append(second)
    return seconds


def _utterances(
    model: Model, generated: Sequence[list[int]], seconds: Sequence[int]
) -> list[tuple[int, str]]:
    silence = model.encoder.special.silence
    spoken: list[tuple[int, list[int]]] = []
    goes_on = False
    for tokens, second in zip(generated, seconds, strict=True):
        words = [token for token in tokens if token != silence]
        if words and goes_on:
            spoken[-1][1].extend(words)
        elif words:
            spoken.append((second, words))
        goes_on = bool(words) and tokens[-1] != silence
    return [(second, model.tokenizer.decode(words)) for second, words in spoken]


def predictions(model: Model, watched: Sequence[ShownSample]) -> list[tuple[Tensor, Tensor]]:
    """Teacher-forced: `Model.predict` of each sample."""
    inputs = []
    for seen in watched:
        encoded = seen.item.encoded
        positions = [] if seen.blind else encoded.frame_positions.tolist()
        inputs.append(ModelInput(encoded.tokens.tolist(), positions, seen.states, seen.ratios))
    return model.predict(inputs)
