"""tools.convert_checkpoint, whose process stops (SIGSTOP) once it has written its first tensor."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from moss_train.convert import to_megatron
from tools.convert_checkpoint import main


def stop_at_first_tensor() -> None:
    """Before any other is written, whatever the machine does."""
    write_boxes, written = to_megatron.write_boxes, count()

    def write(path: Path, boxes: Any, memory: Any, on_bytes: Callable[[int], None]) -> Any:
        return write_boxes(path, boxes, memory, stopping(on_bytes))

    def stopping(on_bytes: Callable[[int], None]) -> Callable[[int], None]:
        def then(size: int) -> None:
            if next(written) == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
            on_bytes(size)

        return then

    to_megatron.write_boxes = write  # type: ignore[assignment]


if __name__ == "__main__":
    stop_at_first_tensor()
    sys.exit(main())
