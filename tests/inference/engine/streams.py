"""A stream that is known beforehand, played through the engine, and its logits offline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor

from inference.engine.engine import Engine
from inference.engine.sampling import Draw, Sampler, Sampling
from inference.engine.slots import Slot, Step
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from inference.kernels import plain

IMAGE = 512


class AnyRows(plain.Attention):
    """Plain attention that takes a choice of slots, as the kernels do."""

    any_rows = True


@dataclass
class Stream:
    """tokens: the whole transcript. prompt: how many of them go in at once. pixels: its frames."""

    tokens: list[int]
    prompt: int
    pixels: Tensor  # [F, 3, h, w]

    @property
    def image_positions(self) -> list[int]:
        return [i for i, token in enumerate(self.tokens) if token == IMAGE]


def make_stream(seed: int, frames: int = 6, silence: int | None = None) -> Stream:
    """A prompt with a frame in it, then frames among words; or, with `silence`, mostly pairs."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(20, 250, (count,), generator=generator).tolist()

    tokens = [*words(4), IMAGE, *words(3)]
    prompt = len(tokens)
    for number in range(frames - 1):
        silent = silence is not None and number % 5 != 3
        tokens += [silence] if silent else words(1 + (number + seed) % 3)  # type: ignore[list-item]
        tokens += [IMAGE]
    tokens += words(3)
    pixels = torch.randn(frames, 3, 56, 56, generator=generator)
    return Stream(tokens, prompt, pixels)


@dataclass
class Player:
    """Plays a stream step by step, teacher-forced: what the engine samples is replaced by what the
    transcript says."""

    engine: Engine
    stream: Stream
    slot: Slot = field(init=False)
    at: int = 0  # tokens that are in
    frame: int = 0
    logits: dict[int, Tensor] = field(default_factory=dict)  # after the token at this index

    def __post_init__(self) -> None:
        self.slot = self.engine.open(Sampling())

    def step(self) -> Step | None:
        """The next step: the prompt, then [pending] or [pending, image]."""
        tokens = self.stream.tokens
        if self.at == 0:
            new = tokens[: self.stream.prompt]
        elif self.at >= len(tokens):
            return None
        else:
            # The pending token, and the frame that follows it.
            self.slot.pending = tokens[self.at]
            new = tokens[self.at + 1 : self.at + 2]
            new = new if new == [IMAGE] else []
            self.at += 1
        count = new.count(IMAGE)
        frames = self.engine.encode(list(self.stream.pixels[self.frame : self.frame + count]))
        self.frame += count
        self.at += len(new)
        return Step(self.slot, new, frames)


def play(engine: Engine, players: list[Player], until: int | None = None) -> None:
    """Plays streams side by side to their ends (or `until` so many steps)."""
    recorded: list[tuple[Tensor, Tensor, Tensor]] = []
    choose = Sampler.__call__

    def record(sampler: Sampler, logits: Tensor, slots: Tensor, positions: Tensor, draw: Draw):
        recorded.append((logits.clone(), slots.clone(), positions.clone()))
        return choose(sampler, logits, slots, positions, draw)

    done = 0
    with mock.patch.object(Sampler, "__call__", record):
        while until is None or done < until:
            running = [(player, step) for player in players if (step := player.step())]
            if not running:
                break
            recorded.clear()
            engine.step([step for _, step in running])
            for player, _ in running:
                # Idle slots take part in passes of fixed shape, at other positions than their own.
                for logits, slots, at in recorded:
                    own = (slots == player.slot.index) & (at == player.slot.position)
                    if own.any():
                        player.logits[player.at - 1] = logits[own][0]
            done += 1


def offline(
    model: MossVideoForConditionalGeneration,
    stream: Stream,
    sees_frame: Callable[[int, int], bool] | None = None,
    sees_token: Callable[[int, int], bool] | None = None,
) -> Tensor:
    """Logits `[S, V]` of one pass over the whole transcript.

    sees_frame(t, f): whether token t sees frame number f; sees_token(t, s): whether it sees
    token s; None: all that came before.
    """
    length, frames = len(stream.tokens), len(stream.pixels)
    cross, mask = None, None
    if sees_frame is not None:
        rows = [[sees_frame(t, f) for f in range(frames)] for t in range(length)]
        cross = torch.tensor(rows)[None, :, :, None]
    if sees_token is not None:
        rows = [[s <= t and sees_token(t, s) for s in range(length)] for t in range(length)]
        mask = torch.tensor(rows)[None, None]
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([stream.tokens]),
            pixel_values=stream.pixels[None, :, None],
            attention_mask=mask,
            cross_attention_mask=cross,
        ).logits[0]


def largest_error(player: Player, wanted: Tensor) -> float:
    """Largest difference of the logits that were played."""
    return max((logits - wanted[i]).abs().max().item() for i, logits in player.logits.items())
