"""How much memory the keys and values of a session take: known from sizes alone, before any of it
is allocated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from data_pipeline import devices
from inference.hf.decoder_moss_video import PIECE

# Places behind `max_tokens`: a pass of fixed shape writes keys and values of all its tokens, also
# of those that only fill it up.
SPARE = 128


@dataclass(frozen=True)
class CacheSizes:
    """Sizes of one slot's caches on one rank.

    own, cross: layers with self- and with cross-attention. kv_heads: of this rank. patches: vision
    tokens of a frame. item: bytes of a number.
    """

    own: int
    cross: int
    kv_heads: int
    head_dim: int
    max_tokens: int
    window: int
    patches: int
    item: int

    @property
    def text_length(self) -> int:
        """Places for tokens, in whole pieces (see `attend_few`)."""
        return _whole(self.max_tokens + SPARE)

    @property
    def frames_length(self) -> int:
        """Places for vision tokens, with those of the frame that arrives in a full ring."""
        return _whole((self.window + 1) * self.patches)

    @property
    def text(self) -> int:
        """Bytes of keys and values of text."""
        return self.own * self._token * self.text_length

    @property
    def frames(self) -> int:
        """Bytes of keys and values of frames."""
        return self.cross * self._token * self.frames_length

    @property
    def _token(self) -> int:
        return 2 * self.kv_heads * self.head_dim * self.item

    def check(self, slots: int, device: torch.device, sampling: int, beside: int = 0) -> None:
        """Raises ValueError where so many slots do not fit into what is free on the device.

        sampling: bytes that a slot's sampling takes. beside: bytes that graphs will take.
        """
        if device.type == "meta":
            return
        each = self.text + self.frames + sampling
        free = devices.free_memory(device) + devices.unused_memory(device)
        if slots * each + beside <= free:
            return
        most = max(0, free - beside) // each
        graphs = f", graphs {gib(beside)} while they are captured" if beside else ""
        instead = f"give max_sessions {most} at most, or" if most else "give"
        without = ", or graphs=False" if beside else ""
        raise ValueError(
            f"max_sessions={slots}: a session takes {gib(each)} (keys and values of text of "
            f"{self.max_tokens} tokens {gib(self.text)}, of {self.window} frames "
            f"{gib(self.frames)}, its sampling {gib(sampling)}): {gib(slots * each)} for "
            f"all{graphs}, and {device} has {gib(free)} free beside the model: {instead} "
            f"a smaller window or max_tokens (--max_context){without}"
        )


def _whole(length: int) -> int:
    return -(-length // PIECE) * PIECE


def gib(size: float) -> str:
    """Bytes as people read them."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.4g} {unit}"
    return f"{size:.0f} bytes"
