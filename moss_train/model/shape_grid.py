"""Few shapes: cuDNN plans its kernels anew for each length that it has not met, 0.14 s each time
(an H200). Lengths in calls of attention are therefore rounded up to a short grid on a GPU; on a
CPU, which plans nothing, they stay.
"""

from __future__ import annotations

from moss_train import hardware
from moss_train.model_config import ModelConfig


def rounds_lengths(model: ModelConfig) -> bool:
    """Whether `model.round_lengths` rounds them on the device of this process."""
    if model.round_lengths == "auto":
        return hardware.on_accelerator()
    return model.round_lengths == "on"


def round_up(length: int, least: int = 1, steps: int = 2) -> int:
    """`length` rounded up to `least` x 1, 2, 4, ..., or one of `steps` equal steps between two of
    them, as far as these are whole numbers.
    """
    if length <= least:
        return least
    below = least << ((length // least).bit_length() - 1)
    step = max(1, below // steps)
    return -(-length // step) * step
