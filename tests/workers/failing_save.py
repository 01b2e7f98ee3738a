"""Saves of two ranks, in which a file that rank 0 writes alone cannot be written: what each rank
says of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor

from moss_train import hardware
from moss_train.train.checkpoint import STRATEGY
from moss_train.train.save import Save, SaveError
from tests.torchrun import OUT, save_result


def save(folder: Path, step: int, obstacle: str) -> str:
    """The error of a save; "" where there is none. obstacle: a folder where a file should be."""
    saving = Save(folder, step)
    saving.open()
    if obstacle and dist.get_rank() == 0:
        (saving.temporary / obstacle).mkdir()
    dist.barrier()
    weight = torch.full((4,), float(dist.get_rank()))
    state = {"weight": ShardedTensor.from_rank_offsets("weight", weight, (0, dist.get_rank(), 2))}
    with saving.noting():
        request = dist_checkpointing.save(
            state, str(saving.temporary), async_sharded_save=True, **STRATEGY
        )
    finalize_fns = request.finalize_fns

    def finalize() -> None:
        saving.complete(finalize_fns, lambda: {"run.json": "{}"})

    try:
        saving.summing(request)._replace(finalize_fns=[finalize]).execute_sync()
    except SaveError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    hardware.activate("cpu")
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    folder = Path(os.environ[OUT]) / "checkpoints"
    for step, obstacle in enumerate([*sys.argv[1:], ""]):
        save_result(obstacle or "none", save(folder, step, obstacle), as_json=True)
    dist.destroy_process_group()
