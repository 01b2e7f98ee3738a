"""How a slot's next token is chosen from logits: on the device, and alike in any batch.

Random numbers are a hash of (seed, position, token). So a slot's draws do not depend on the slots
beside it, a restored session draws what it would have drawn, and CUDA graphs need no generator.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntFlag
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from data_pipeline.fields import check_values, number, numbers_by
from inference.engine.upload import upload

SEEDS = (-(2**63), 2**63 - 1)  # allowed
NO_TOKEN = -1  # in place of one, where logits are NaN
DRAWN_SEEDS = 2**53  # a seed that is drawn is below: every reader of JSON holds it exactly
# Fields of Sampling that are numbers of a slot on the device, in the order of their columns.
_NUMBERS = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "silence_bias",
)  # fmt: skip


class Draw(IntFlag):
    """What choosing a token takes. A batch does for all slots what any of them needs: the union."""

    GREEDY = 0  # the largest logit, unchanged
    WHOLE = 1  # changed logits; a draw from all tokens
    CUT = WHOLE | 2  # a draw from the most likely tokens, for which the vocabulary is sorted
    EXTRA = WHOLE | 4  # further passes over the logits, for Sampling's `extra`


DRAWS = (Draw.GREEDY, Draw.WHOLE, Draw.CUT, Draw.EXTRA, Draw.CUT | Draw.EXTRA)  # all there are


@dataclass
class Sampling:
    """How one slot samples. In this order: logit_bias, penalties, silence_bias, temperature, min_p,
    top_k, top_p.

    temperature: 0 takes the most likely token.
    top_k: only the k most likely tokens (0, and -1 as vLLM writes it: all).
    top_p: only the most likely of those that together have this probability.
    min_p: only tokens at least this probable, as a share of the most likely one's probability.
    repetition_penalty: logits of tokens in the context are divided (if positive) or multiplied by
        it, as in transformers; `<|silence|>` is exempt, which a stream repeats all the time, as it
        is from the next two.
    presence_penalty: subtracted from the logit of a token that was sampled before, as in OpenAI's
        API.
    frequency_penalty: subtracted from a token's logit as often as it was sampled before.
    silence_bias: added to the logit of `<|silence|>`: above 0 the model speaks less.
    seed: of the draws, a signed 64-bit number; None: a new one, which `seed` then holds.
    logit_bias: added to the logits of these tokens.

    Raises ValueError that names a field out of range.
    """

    temperature: float = number(0.0, least=0)
    top_k: int = number(0, least=0)
    top_p: float = number(1.0, above=0, most=1)
    min_p: float = number(0.0, least=0, most=1)
    repetition_penalty: float = number(1.0, above=0)
    presence_penalty: float = number(0.0)
    frequency_penalty: float = number(0.0)
    silence_bias: float = number(0.0)
    seed: int | None = number(None, least=SEEDS[0], most=SEEDS[1])
    logit_bias: dict[int, float] = numbers_by()  # noqa: RUF009

    def __post_init__(self) -> None:
        self.top_k = 0 if self.top_k == -1 else self.top_k
        self.seed = secrets.randbelow(DRAWN_SEEDS) if self.seed is None else self.seed
        check_values(self, "sampling: ")

    @property
    def draw(self) -> Draw:
        """The operations that choosing this slot's token takes."""
        draw = Draw.EXTRA if self.extra else Draw.GREEDY
        if self.temperature > 0:
            return draw | (Draw.CUT if self.top_k or self.top_p < 1 else Draw.WHOLE)
        changed = self.repetition_penalty != 1 or self.silence_bias
        return draw | (Draw.WHOLE if changed else Draw.GREEDY)

    @property
    def extra(self) -> bool:
        """Whether it has settings that few have: min_p, logit_bias, penalties by counts."""
        return self.counts or bool(self.logit_bias) or (self.min_p > 0 and self.temperature > 0)

    @property
    def counts(self) -> bool:
        """Whether it matters how often each token was sampled."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0


def draw_of(samplings: Iterable[Sampling]) -> Draw:
    """What choosing a token of each takes together: known on the host, and alike on all ranks."""
    return reduce(or_, (sampling.draw for sampling in samplings))


def bytes_of_slot(vocabulary: int) -> int:
    """Bytes that a Sampler keeps for each slot: `in_context`, `sampled_counts` and `bias`."""
    return vocabulary * (torch.bool.itemsize + torch.int32.itemsize + torch.float32.itemsize)


class Sampler:
    """Settings of all slots in device tensors, the tokens of each slot's context, and how often
    each was sampled."""

    def __init__(self, slots: int, vocabulary: int, silence: int | None, device: torch.device):
        self.silence = silence
        self.in_context = torch.zeros(slots, vocabulary, dtype=torch.bool, device=device)
        self.sampled_counts = torch.zeros(slots, vocabulary, dtype=torch.int32, device=device)
        self.bias = torch.zeros(slots, vocabulary, dtype=torch.float32, device=device)
        self._biased = set[int]()  # slots
        self.settings = torch.zeros(slots, len(_NUMBERS), dtype=torch.float64, device=device)
        self.seeds = torch.zeros(slots, dtype=torch.int64, device=device)

    def open(self, slot: int, sampling: Sampling) -> None:
        """A new context with these settings."""
        self.set(slot, sampling)
        self.in_context[slot] = False
        self.sampled_counts[slot] = 0

    def set(self, slot: int, sampling: Sampling) -> None:
        """Other settings for the same context."""
        device = self.settings.device
        row = [float(getattr(sampling, name)) for name in _NUMBERS]
        self.settings[slot] = upload(row, device, torch.float64)
        if slot in self._biased:
            self.bias[slot] = 0
            self._biased.remove(slot)
        if sampling.logit_bias:
            self._biased.add(slot)
            tokens = upload([*sampling.logit_bias], device, torch.int64)
            added = upload([*sampling.logit_bias.values()], device, torch.float32)
            self.bias[slot].index_copy_(0, tokens, added)
        assert sampling.seed is not None
        self.seeds[slot].fill_(sampling.seed)  # for `= seed` the host would wait

    def add_context(self, slot: int, tokens: Sequence[int]) -> None:
        """Adds tokens to the context that the repetition penalty counts."""
        counted = [t for t in tokens if t < self.in_context.shape[1] and t != self.silence]
        if counted:
            self.in_context[slot].index_fill_(0, upload(counted, self.in_context.device), True)

    def add_sampled(self, slot: int, token: int, sampling: Sampling) -> None:
        """Adds a token that was sampled with these settings, where they ask for it."""
        if sampling.repetition_penalty != 1:
            self.add_context(slot, [token])
        if sampling.counts and token != self.silence:
            self.sampled_counts[slot, token].add_(1)

    def check(self, sampling: Sampling | None) -> None:
        """Raises ValueError for a bias of what is no token that can be sampled."""
        most = self.sampled_counts.shape[1] - 1
        for token in sampling.logit_bias if sampling is not None else ():
            if not 0 <= token <= most:
                words = f"{token}: the model says tokens from 0 to {most}"
                raise ValueError(f"sampling: logit_bias: {words}")

    def __call__(self, logits: Tensor, slots: Tensor, positions: Tensor, draw: Draw) -> Tensor:
        """Tokens `[n]` at `positions` `[n]` of `slots` `[n]`, from logits `[n, V]`; NO_TOKEN where
        one of these is NaN.

        draw: what the slots take together.
        """
        if draw == Draw.GREEDY:
            return _likeliest(logits)
        settings = self.settings[slots][..., None]  # [n, 8, 1]
        temperature, top_k, top_p, min_p, *changes = settings.unbind(1)
        extra = Draw.EXTRA in draw
        scores = self._changed(logits, slots, *changes, extra=extra)
        scaled = scores / torch.where(temperature > 0, temperature, 1.0).float()
        if extra:
            least = scaled.amax(-1, keepdim=True) + min_p.log().float()
            scaled = scaled.masked_fill(scaled < least, -torch.inf)
        seed = self.seeds[slots][:, None]
        if Draw.CUT in draw:
            drawn = _draw_cut(scaled, top_k, top_p, seed, positions)
        else:
            tokens = torch.arange(scores.shape[1], device=scores.device)
            drawn = (scaled + _gumbel(seed, positions, tokens)).argmax(-1)
        likeliest = _likeliest(scores)
        return torch.where((temperature[:, 0] > 0) & (likeliest != NO_TOKEN), drawn, likeliest)

    def _changed(
        self,
        logits: Tensor,
        slots: Tensor,
        repetition: Tensor,
        presence: Tensor,
        frequency: Tensor,
        silence: Tensor,
        *,
        extra: bool,
    ) -> Tensor:
        """Logits `[n, V]` in fp32 with the biases and penalties `[n, 1]` of their slots; of
        `logit_bias` and what was counted only if `extra`."""
        scores = logits.float()
        if extra:
            scores = scores + self.bias[slots]
        repetition = repetition.float()
        penalized = torch.where(scores > 0, scores / repetition, scores * repetition)
        scores = torch.where(self.in_context[slots], penalized, scores)
        if extra:
            counts = self.sampled_counts[slots]
            scores -= counts * frequency.float() + (counts > 0) * presence.float()
        if self.silence is not None:
            scores[:, self.silence] += silence[:, 0].float()
        return scores


def _likeliest(logits: Tensor) -> Tensor:
    """The token of the largest logit `[n]`; of a row with a NaN, which counts as the largest,
    NO_TOKEN."""
    largest, tokens = logits.max(-1)
    return tokens.masked_fill(largest.isnan(), NO_TOKEN)


def _gumbel(seed: Tensor, at: Tensor, tokens: Tensor) -> Tensor:
    """Noise with which the largest of `scores + noise` is a draw from softmax(scores)."""
    return -torch.log(-torch.log(uniform(seed, at[:, None], tokens))).float()


def _draw_cut(scaled: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, at: Tensor) -> Tensor:
    """Samples from softmax(scaled) cut to top_k and top_p; a row that cuts nothing draws what it
    would without the cut."""
    ordered, tokens = scaled.sort(-1, descending=True)
    rank = torch.arange(scaled.shape[1], device=scaled.device)
    ordered = ordered.masked_fill((top_k > 0) & (rank >= top_k), -torch.inf)
    chances = ordered.softmax(-1)
    before = chances.cumsum(-1) - chances  # probability of all tokens that are likelier
    ordered = ordered.masked_fill((before >= top_p) & (rank > 0), -torch.inf)
    best = (ordered + _gumbel(seed, at, tokens)).argmax(-1, keepdim=True)
    return tokens.gather(1, best)[:, 0]


def uniform(seed: Tensor, position: Tensor, token: Tensor) -> Tensor:
    """Numbers in (0, 1), fp64, that depend on three int64 tensors alone.

    The mixing is splitmix64's (Steele, Lea, Flood 2014); int64 products wrap as unsigned ones do.
    """
    x = seed * _signed(0x9E3779B97F4A7C15) + position * _signed(0xD1B54A32D192ED03) + token
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    x = x ^ _shifted(x, 31)
    return (_shifted(x, 12).double() + 0.5) / 2.0**52


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Unsigned shift to the right."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
