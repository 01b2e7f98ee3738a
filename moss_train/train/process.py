"""This process as a rank of the job: joins the process group, catches signals."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.managers import SyncManager

import torch
import torch.distributed as dist
import torch.multiprocessing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from moss_train import hardware
from moss_train.config import Config


def start_process_group(config: Config) -> None:
    """Joins the job. Works under torchrun, and without it as a job of one rank."""
    if config.trainer.deterministic:
        hardware.make_deterministic()
    device = hardware.activate(config.hardware.device)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0" if "RANK" not in os.environ else "29500")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    threads = config.hardware.threads or max(1, len(os.sched_getaffinity(0)) // local)
    torch.set_num_threads(threads)
    dist.init_process_group(
        hardware.backend(device.type), timeout=timedelta(seconds=config.hardware.timeout_s)
    )
    hardware.seed_everything(config.trainer.seed)


@contextmanager
def stop_signals() -> Iterator[list[float]]:
    """Collects SIGTERM and SIGINT instead of dying of them.

    The same request may come twice, from a batch system and from torchrun. A second Ctrl-C of an
    impatient user (after a second or more) has its usual effect.
    """
    caught: list[float] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, _frame: object) -> None:
        caught.append(time.monotonic())
        if number == signal.SIGINT and caught[-1] - caught[0] > 1:
            raise KeyboardInterrupt

    for number in before:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_writer_queue() -> None:
    """Gives megatron's checkpoint writer the queue that it would start a process for.

    It spawns that process anew, which imports torch again and takes two seconds; this one is a fork
    of the rank. The name is the same in megatron-core 0.16 and 0.19; there is no public way.
    """
    server = SyncManager(ctx=multiprocessing.get_context("fork"))
    # The process ends with its rank, however that ends.
    server.start(torch.multiprocessing._prctl_pr_set_pdeathsig, (signal.SIGKILL,))  # type: ignore
    filesystem_async._results_queue = server.Queue()
