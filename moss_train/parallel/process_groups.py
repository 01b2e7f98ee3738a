"""Builds the process groups of a run, which are passed around instead of looked up.

The decoder is tensor x pipeline x data parallel. The vision encoder has a second view of the same
ranks: it is replicated on all of them (or sharded over `tensor`, with `parallel.vision_tensor`) and
each rank encodes its share of the frames, so its data-parallel group spans the whole world.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.distributed import ProcessGroup

from moss_train.config import HardwareConfig, ParallelConfig
from moss_train.model.groups import Groups


def build_groups(
    parallel: ParallelConfig, seed: int, timeout_s: float = HardwareConfig.timeout_s
) -> Groups:
    """Creates all groups. torch.distributed must be initialized.

    timeout_s: seconds after which a collective of any of them ends the job.

    Raises:
        RuntimeError: the world size is not a multiple of tensor x pipeline.
    """
    if parallel_state.model_parallel_is_initialized():  # by another model of this process
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout_s / 60,  # it makes a timedelta of it
    )
    model_parallel_cuda_manual_seed(seed)
    world = dist.group.WORLD
    assert world is not None
    decoder = ProcessGroupCollection.use_mpu_process_groups()
    decoder.intra_dist_opt = world  # gradient norms are summed over all ranks
    timeout = timedelta(seconds=timeout_s)
    vision = _vision_groups(parallel, decoder, world, timeout)
    return Groups(decoder, vision, decoder.mp, world, _host_group(decoder.mp, timeout))


def _host_group(group: ProcessGroup, timeout: timedelta) -> ProcessGroup:
    """The ranks of `group` once more, over gloo: text need not go through a GPU to be read by
    Python, and comes while the other group is at work (train/data.py).
    """
    if group.size() == 1:
        return group
    own = tuple(dist.get_process_group_ranks(group))
    everywhere: list[tuple[int, ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    groups = {
        ranks: dist.new_group([*ranks], timeout, backend="gloo")
        for ranks in sorted(set(everywhere))
    }
    return groups[own]


def _vision_groups(
    parallel: ParallelConfig,
    decoder: ProcessGroupCollection,
    world: ProcessGroup,
    timeout: timedelta,
) -> ProcessGroupCollection:
    alone = dist.new_group([dist.get_rank()], timeout, use_local_synchronization=True)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.tp, groups.mp = alone, alone
    groups.pp = groups.tp_ep_pp = groups.expt_dp = alone
    groups.dp = groups.dp_cp = world
    if parallel.vision_tensor and parallel.tensor > 1:
        groups.tp = groups.mp = decoder.tp
        # All ranks make all of them: a group that its members make alone is named after how many
        # groups a rank is in, and the stages of a pipeline, which are in different ones, would wait
        # for each other under different names.
        sharing = [
            dist.new_group([*range(first, world.size(), parallel.tensor)], timeout)
            for first in range(parallel.tensor)
        ]
        groups.dp = groups.dp_cp = sharing[decoder.tp.rank()]
    groups.intra_dist_opt = world
    return groups
