"""Makes the parts of an import as tasks of Ray, one a part, on any number of machines.

Plain tasks: a part whose worker or machine is killed is made again, on another one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from data_pipeline.engines.job import Job, make_part
from data_pipeline.shards import ShardError


def run_ray(job: Job, address: str | None, retries: int, done: Callable[[int], None]) -> None:
    """Makes the parts that are missing, calling `done` after each; a core each.

    Args:
        address: of the cluster; None: RAY_ADDRESS, one that runs here, or one of this machine.
        retries: how often a part is made again whose worker or machine was killed.

    Raises ShardError where a part fails, or no cluster is there, and what `done` raises.
    """
    try:
        import ray
    except ImportError:
        raise ShardError(
            "--engine ray needs another package: pip install 'moss-train[ray]'"
        ) from None
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ShardError(f"no Ray cluster at {address or 'RAY_ADDRESS'}: {error}") from None
    task = ray.remote(make_part).options(
        num_cpus=1,
        max_retries=retries,
        retry_exceptions=[OSError],  # of a shared disk
        scheduling_strategy="SPREAD",
        name="part of an import",
    )
    pending = {task.remote(job, number): number for number in job.missing()}
    try:
        while pending:
            for ended in ray.wait(list(pending), num_returns=1)[0]:
                number = pending.pop(ended)
                _result(ended, number)
                done(number)
    finally:
        for task_of_part in pending:
            ray.cancel(task_of_part, force=True)
        if ours:
            ray.shutdown()


def _result(ended: Any, number: int) -> None:
    """Raises ShardError for a part that could not be made."""
    import ray

    try:
        ray.get(ended)
    except ray.exceptions.RayTaskError as error:
        raise ShardError(f"part {number}: {error.cause}") from None
    except ray.exceptions.RayError as error:
        line = str(error).strip().splitlines()[0]
        raise ShardError(
            f"part {number}: its worker or machine was killed too often (out of memory?): {line}"
        ) from None
