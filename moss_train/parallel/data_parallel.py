"""megatron's data parallelism, without collectives where the group has one rank."""

from __future__ import annotations

from typing import Any

from megatron.core.distributed import DistributedDataParallel, param_and_grad_buffer
from megatron.core.process_groups_config import ProcessGroupCollection

_buffers: Any = param_and_grad_buffer
_REDUCE_SCATTER = _buffers.dist_reduce_scatter_func  # before any model has asked for another


class DataParallel(DistributedDataParallel):
    """Gradients and parameters of one rank's modules, sharded over the data-parallel group.

    megatron reduces and gathers over a group of one rank too: copies through the backend which, on
    a CPU, took a tenth of a small model's step.
    """

    def __init__(self, *args: Any, pg_collection: ProcessGroupCollection, **kwargs: Any):
        # megatron keeps `reduce_scatter_with_fp32_accumulation` in a global that it never resets:
        # what overlaps would be reduced by the last model's function and not be waited for.
        _buffers.dist_reduce_scatter_func = _REDUCE_SCATTER
        super().__init__(*args, pg_collection=pg_collection, **kwargs)
        options = self.ddp_config
        overlaps = options.overlap_grad_reduce or options.overlap_param_gather
        self.alone = pg_collection.dp.size() == 1 and not overlaps

    def finish_grad_sync(self, *args: Any, **kwargs: Any) -> None:
        """Sums the gradients over the group."""
        if not self.alone:
            super().finish_grad_sync(*args, **kwargs)

    def start_param_sync(self, *args: Any, **kwargs: Any) -> None:
        """Gathers the updated parameters from the group."""
        if not self.alone:
            super().start_param_sync(*args, **kwargs)
