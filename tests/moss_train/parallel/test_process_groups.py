"""What all process groups of a job have in common."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from moss_train.config import HardwareConfig


def test_every_group_ends_a_collective_after_the_configured_time(groups) -> None:
    """megatron's own default is half an hour; torch's, another one for each backend."""
    made = [group for group in dist.distributed_c10d._world.pg_map if group != dist.group.WORLD]
    found = {group._get_backend(torch.device("cpu")).options._timeout for group in made}
    assert len(made) > 10
    assert found == {timedelta(seconds=HardwareConfig.timeout_s)}
    assert found != {dist.constants.default_pg_timeout}
