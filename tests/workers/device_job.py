"""A whole job on a simulated GPU: device_job.py '[OVERRIDE, ...]' (JSON), as launch/train.py."""

from __future__ import annotations

import json
import sys
import threading
from types import SimpleNamespace
from typing import Any

import torch

from data_pipeline import devices
from tests import simulated_cuda

MEMORY = 140 * 10**9  # bytes
STATE = 16  # bytes of the state of CUDA's random generator: a seed and an offset


def main(overrides: list[str]) -> None:
    torch.set_num_threads(1)
    simulated_cuda.install()
    _simulate_driver()
    _simulate_in_threads()
    from moss_train.compose import load_config
    from moss_train.log import configure
    from moss_train.main import run

    configure()
    run(load_config(overrides=overrides))


def _simulate_driver() -> None:
    """What a job asks of a GPU's driver beside its steps."""
    devices.BACKENDS["cuda"] = "gloo"
    cuda: Any = torch.cuda
    cuda.get_device_name = lambda *_: "NVIDIA H200"
    cuda.get_device_properties = lambda *_: SimpleNamespace(total_memory=MEMORY)
    cuda.mem_get_info = lambda *_: (MEMORY, MEMORY)
    cuda.get_rng_state = lambda *_: torch.zeros(STATE, dtype=torch.uint8)
    cuda.set_rng_state = _take_random_state
    from megatron.core.tensor_parallel import random

    module: Any = random
    module._get_cuda_rng_state, module._set_cuda_rng_state = cuda.get_rng_state, _take_random_state


def _take_random_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    if len(state) != STATE:
        raise RuntimeError("RNG state is wrong size")  # CUDAGeneratorImpl::set_state


def _simulate_in_threads() -> None:
    """Modes of torch's are those of one thread: others begin with the simulation's."""
    thread: Any = threading.Thread
    plain_run = thread.run

    def run(self: threading.Thread) -> None:
        with simulated_cuda._Functions(), simulated_cuda._Operators():
            plain_run(self)

    thread.run = run


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
