"""Copies from the host to the device for which the host does not wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data_pipeline import devices


def upload(
    values: Tensor | Sequence[Any], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Numbers of the host on `device` (int64 for integers, if no dtype is given).

    To most accelerators they go through page-locked memory. A copy from ordinary memory waits
    until the device has done all that it was given.
    """
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    if not devices.pins(device) or devices.is_accelerator(tensor):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
