"""Loads a checkpoint onto a simulated GPU: saves its weights, and what was asked of the device.

Arguments: checkpoint; how to quantize it, if at all; or `broken`: buffers lose their last number.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from tests import simulated_cuda

BROKEN = "broken"


def main() -> None:
    checkpoint, *rest = sys.argv[1:]
    option = rest[0] if rest else None
    torch.set_num_threads(1)
    simulated_cuda.install()
    torch.cuda.get_device_name = lambda *_: "a simulated GPU"  # type: ignore[assignment]
    from inference.engine import staging
    from inference.engine.load import load_model
    from tests.torchrun import save_result

    if option == BROKEN:
        _break(staging._Buffer)
    assert staging.works(simulated_cuda.CUDA) == (option != BROKEN)
    with simulated_cuda.recording() as seen:
        model = load_model(checkpoint, "cuda", quantize=None if option == BROKEN else option)
    tensors = model.state_dict()
    assert all(simulated_cuda.on_device(x) for x in tensors.values())
    save_result("weights", {name: x.cpu() for name, x in tensors.items()})
    save_result("seen", seen)


def _break(buffer: Any) -> None:
    fill = buffer.fill

    def losing(self: Any, source: Tensor, dtype: torch.dtype) -> Tensor:
        made: Tensor = fill(self, source, dtype)
        made.view(-1)[-1] = 0
        return made

    buffer.fill = losing


if __name__ == "__main__":
    main()
