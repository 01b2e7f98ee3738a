"""This process as a rank of the job: joins the process group, catches signals."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from multiprocessing.managers import SyncManager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async

from data_pipeline import devices
from data_pipeline.cgroups import cores
from data_pipeline.open_files import allow_open_files
from data_pipeline.parent import signalled_with_parent
from data_pipeline.ranks import Ranks, joining, ranks_of, ranks_of_machine
from data_pipeline.signal_handlers import handling
from moss_train import hardware
from moss_train.config import Config
from moss_train.log import print_line
from moss_train.processes import end_with_launcher

_users = 0  # jobs and models of this process that need its process group
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # a job saves and ends
_signal_times: list[float] | None = None  # when they came, while they are collected
_started = False  # by this module: then it is ended by it, too


@contextmanager
def process_group(config: Config) -> Iterator[None]:
    """Joins the job's process group on entry; leaves it at the end."""
    start_process_group(config)
    try:
        yield
    except BaseException as error:
        # With other ranks the group is left to the process's end: they would notice that this
        # rank has gone, and report that before this rank's error.
        if dist.get_world_size() == 1:
            leave_process_group()
        elif _comes_from_another_rank(error):
            time.sleep(1.1)  # torchrun names the rank with the earliest second as the root cause
        raise
    leave_process_group()


def _comes_from_another_rank(error: BaseException) -> bool:
    """True where a collective met a rank that is gone."""
    lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # gloo's words
    return isinstance(error, dist.DistError) or any(words in str(error) for words in lost)


def start_process_group(config: Config) -> None:
    """Joins the job under torchrun; without it, a job of one rank, which needs no network.

    A process that is in one already (a job after a model that is still open) shares it.

    Raises:
        JoinError: the ranks do not come together.
    """
    global _users, _started
    if "RANK" in os.environ and sys.platform == "linux":
        _take_forks_along()
        end_with_launcher()
    allow_open_files()  # each group of gloo's has some for each rank
    if config.trainer.deterministic:
        hardware.make_deterministic()
    device = hardware.activate(config.hardware.device)
    threads = config.hardware.threads
    if threads is None:
        threads = max(1, cores() // ranks_of_machine())
    torch.set_num_threads(threads)
    if not dist.is_initialized():
        ranks = started_ranks()
        with joining(ranks, print_line):
            dist.init_process_group(
                devices.backend(device.type),
                timeout=timedelta(seconds=config.hardware.timeout_s),
                store=_store(ranks),
                rank=ranks.rank,
                world_size=ranks.size,
            )
        _started = True
    elif dist.get_backend() != devices.backend(device.type):
        raise RuntimeError(
            f"hardware.device={device.type}: this process is in a process group of "
            f"{dist.get_backend()} already, for another device: start another process"
        )
    _users += 1
    hardware.seed_everything(config.trainer.seed)


def started_ranks() -> Ranks:
    """This process's rank among those that open a model together: torchrun's, else a single one,
    whatever WORLD_SIZE says; a job has checked that."""
    return ranks_of() if "RANK" in os.environ else Ranks()


def _store(ranks: Ranks) -> dist.Store | None:
    """Where the ranks find each other; None: torch's own way.

    torchrun keeps its store when it starts the ranks again: a rank that is early would find the
    addresses of those that have ended. (On several machines their numbers of starts may differ;
    launch/torchrun.py has torchrun make a new store.)
    """
    if ranks.size == 1:
        return dist.HashStore()
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if start == "0" or not kept or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return None
    return store_of(ranks, f"start_{start}")


def store_of(ranks: Ranks, name: str) -> dist.Store:
    """The part `name` of torchrun's store, over a connection of its own: one that a thread waits in
    (as gloo does) answers no other. Raises RuntimeError where nobody listens."""
    host, _, port = ranks.address.rpartition(":")
    return dist.PrefixStore(name, dist.TCPStore(host, int(port), is_master=False))


def leave_process_group() -> None:
    """Ends the process group, and what megatron made of it, after the last of its users."""
    global _users, _started
    _users -= 1
    if _users == 0 and _started:
        _started = False
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextmanager
def stop_signals() -> Iterator[list[float]]:
    """Collects SIGTERM, SIGINT and SIGUSR1 instead of dying of them (in the main thread alone:
    others get no signals). Within another `stop_signals` it is that one's list.

    The same request may come twice, from a batch system and from torchrun. A second Ctrl-C of an
    impatient user (after a second or more) has its usual effect.
    """
    global _signal_times
    if _signal_times is not None or threading.current_thread() is not threading.main_thread():
        yield [] if _signal_times is None else _signal_times
        return
    caught: list[float] = []

    def note(number: int, _frame: object) -> None:
        caught.append(time.monotonic())
        if number == signal.SIGINT and caught[-1] - caught[0] > 1:
            raise KeyboardInterrupt

    with handling(STOPS, note):
        _signal_times = caught
        try:
            yield caught
        finally:
            _signal_times = None


def start_writer_queue() -> None:
    """Gives megatron's checkpoint writer the queue that it would start a process for.

    It spawns that process anew, which imports torch again and takes two seconds, and first runs a
    user's script again that is not protected by `__name__ == "__main__"`; this one is a fork of the
    rank. The name is the same in megatron-core 0.16 and 0.19; there is no public way.
    """
    on_main = threading.current_thread() is threading.main_thread()
    if filesystem_async._results_queue is not None or sys.platform != "linux" or not on_main:
        return
    # A name of Linux's that is no file's: nothing is left of a rank that is killed.
    address = f"\0moss-train-{os.getpid()}-{secrets.token_hex(8)}"
    server = SyncManager(address, ctx=multiprocessing.get_context("fork"))
    server.start(_outlive_signals, (os.getpid(),))
    filesystem_async._results_queue = server.Queue()


@cache
def _take_forks_along() -> None:
    """Every later fork of this rank (loader workers, megatron's checkpoint writers) ends with it.

    A writer of a rank that is killed while it waits for it waits for that rank for ever, and keeps
    the rank's sockets open: the other ranks would not notice that it has gone.
    """
    rank: list[int] = []

    def before() -> None:  # the signal comes when the thread that forked ends
        on_main = threading.current_thread() is threading.main_thread()
        rank[:] = [os.getpid()] if on_main else []

    def in_child() -> None:
        if rank:
            signalled_with_parent(rank[0])

    os.register_at_fork(before=before, after_in_child=in_child)


def _outlive_signals(rank: int) -> None:
    """Runs in the queue's process: it ignores signals, and ends with its rank (with the thread that
    started it), however that ends. torchrun and batch systems signal every process of a job, and
    the rank saves then."""
    signalled_with_parent(rank)
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
