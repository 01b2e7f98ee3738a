"""flash-attn in the place of torch's attention.

It takes no mask. Tokens that see the same frames, one after the other, are one call for each run of
places that these frames lie in: a ring that holds one frame more than a token may see is two runs.
What such calls give is joined by their rows' sums of exponentials.
"""

from __future__ import annotations

import torch
from torch import Tensor

from data_pipeline import flash
from inference.engine.attend import runs
from inference.kernels import plain

# Of each run of tokens: its first and last, and [first, last) of the places that they see.
Plan = list[tuple[slice, list[slice]]]


class FlashAttention:
    """`Attend` by flash-attn, 2 or 4."""

    fixed = plain.Attention

    def __init__(self) -> None:
        self._whole = flash.load().whole

    def text(self, count: int, length: int, device: torch.device) -> None:
        return None

    def frames(
        self, visible: Tensor | None, patches: int, places: int, device: torch.device
    ) -> Plan:
        if visible is None:
            return [(slice(None), [slice(None)])]
        plan: Plan = []
        for start, stop in runs(visible):
            row = visible[start]
            visible_places = [
                slice(first * patches, last * patches) for first, last in runs(row) if row[first]
            ]
            plan.append((slice(start, stop), visible_places))
        return plan

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, length: int, plan: Plan | None) -> Tensor:
        q, k, v = q.transpose(1, 2), *(x[:, :, :length].transpose(1, 2) for x in (k, v))
        if plan is None:
            return self._whole(q, k, v, True)[0].transpose(1, 2)
        out = [self._over(q[:, tokens], k, v, places) for tokens, places in plan]
        return torch.cat(out, dim=1).transpose(1, 2)

    def _over(self, q: Tensor, k: Tensor, v: Tensor, places: list[slice]) -> Tensor:
        parts = [self._whole(q, k[:, place], v[:, place], False) for place in places]
        if len(parts) == 1:
            return parts[0][0]
        outs, sums = (torch.stack(x) for x in zip(*parts, strict=True))
        shares = (sums - sums.logsumexp(0)).exp().transpose(2, 3)[..., None]  # [parts, 1, S, h, 1]
        return (outs * shares).sum(0).to(q.dtype)

    def tower(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is None, "attention=flash is refused for a tower with a mask"
        return self._whole(q, k, v, False)[0]
