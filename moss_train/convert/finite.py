"""Notes weights that are no numbers."""

from __future__ import annotations

import threading
from pathlib import Path

from torch import Tensor

from moss_train.convert.source import ConversionError


class Finite:
    """Looks at every tensor, if asked to, and refuses them all at the end."""

    def __init__(self, active: bool):
        self.active, self.lock = active, threading.Lock()
        self.bad: dict[str, int] = {}

    def look(self, name: str, tensor: Tensor) -> None:
        """Counts what is not finite."""
        if not self.active or not tensor.is_floating_point():
            return
        count = tensor.numel() - int(tensor.isfinite().sum())
        if count:
            with self.lock:
                self.bad[name] = self.bad.get(name, 0) + count

    def conclude(self, source: Path) -> None:
        """Raises ConversionError with a line for each tensor that is not finite."""
        if self.bad:
            lines = [
                f"{name}: {count} numbers are NaN or infinite" for name, count in self.bad.items()
            ]
            raise ConversionError("\n".join([f"{source}: has weights that are not finite", *lines]))
