"""Ends the process groups of a layout, before the next one of the same processes."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import distributed_c10d


def end_groups() -> None:
    """Ends all groups but that of all ranks, which call this together. Each has threads of gloo's
    that wake up a hundred times a second while it is there: those of ten layouts take a third of a
    core from each rank."""
    from megatron.core import parallel_state  # after hardware.activate

    parallel_state.destroy_model_parallel()
    dist.barrier()  # no rank waits for another one in them any more
    for group in [*distributed_c10d._world.pg_map]:
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
