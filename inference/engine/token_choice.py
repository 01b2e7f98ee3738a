"""What a step asks of the choice of its token: which tokens may come, and how likely they were.

Both read and change the logits between the pass and the draw. Nothing of them stays on the device:
a captured graph reads the logits that it finds, and slots that ask for neither cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from inference.engine.slots import Step
from inference.engine.upload import upload

MOST_LIKELY = 20  # tokens that a step may ask for beside its own, as OpenAI's API bounds them
WORD = 32  # tokens in a number of a mask


def choose_tokens(
    logits: Tensor, steps: Sequence[Step], rows: Sequence[int], draw: Callable[[], Tensor]
) -> Tensor:
    """The tokens `[n]` that `draw` takes from `logits` `[n, V]`, of all rows.

    Rows of `steps` with `allowed` keep the logits of these tokens; others become -inf, in place. A
    step with `likely` finds in `slot.likely` what the model itself found likely: before the mask,
    the temperature and the penalties.
    """
    asking = [(row, step) for row, step in zip(rows, steps, strict=True) if step.likely is not None]
    masked = {row: step.allowed for row, step in zip(rows, steps, strict=True)}
    masks = {row: mask for row, mask in masked.items() if mask is not None}
    if not (asking or masks):
        return draw()
    where = upload([row for row, _ in asking], logits.device, torch.long)
    own = logits[where].float() if asking else None  # a copy [m, V]
    if masks:
        words = -(-logits.shape[1] // WORD)  # of a mask; a tokenizer may have more tokens
        _forbid(logits, list(masks), torch.stack([mask[:words] for mask in masks.values()]))
    tokens = draw()
    if own is not None:
        found = tokens[where].clamp(min=0)  # NO_TOKEN has none, which is known later
        report = _likelihoods(own, found, max(step.likely or 0 for _, step in asking))
        for (_, step), values in zip(asking, report, strict=True):
            step.slot.likely = values
    return tokens


def all_but(tokens: Iterable[int], count: int) -> Tensor:
    """`Step.allowed` of `count` tokens but these."""
    allowed = torch.ones(-(-count // WORD) * WORD, dtype=torch.int64)
    allowed[[token for token in tokens if token < count]] = 0
    return (allowed.view(-1, WORD) << torch.arange(WORD)).sum(1).to(torch.int32)


def read_likely(values: Tensor, count: int) -> tuple[float, list[tuple[int, float]]]:
    """`Slot.likely` on the host: the log-probability of the sampled token; the `count` most likely
    tokens and theirs. It waits for the device."""
    own, *rest = values.tolist()
    half = len(rest) // 2
    return own, [(int(rest[i]), rest[half + i]) for i in range(count)]


def _forbid(logits: Tensor, rows: list[int], masks: Tensor) -> None:
    """masks: int32 `[m, W]`: bit i of number j is token `WORD` j + i."""
    where, bits = upload(rows, logits.device), upload(masks, logits.device)
    shifts = torch.arange(WORD, device=logits.device, dtype=torch.int32)
    allowed = ((bits[..., None] >> shifts) & 1).flatten(1)[:, : logits.shape[1]].bool()
    logits[where] = logits[where].masked_fill(~allowed, -torch.inf)


def _likelihoods(logits: Tensor, tokens: Tensor, most: int) -> Tensor:
    """`[m, 1 + 2 most]` fp64 of `[m, V]`: log-probability of `tokens`, the most likely ones, and
    theirs."""
    total = logits.logsumexp(-1, keepdim=True)
    best = logits.topk(most, -1)
    own = logits.gather(1, tokens[:, None]) - total
    return torch.cat([own.double(), best.indices.double(), (best.values - total).double()], 1)
