"""What the environment says of a job's ranks, and what a rank says while others are missing."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from datetime import timedelta
from queue import Queue

import pytest
from torch.distributed import TCPStore

from data_pipeline import ranks
from data_pipeline.ranks import JoinError, Ranks, RanksError, joining, ranks_of
from tests.waiting import PATIENCE

MEET = {"MASTER_ADDR": "node1", "MASTER_PORT": "29511"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Ranks()),
        ({"WORLD_SIZE": "1"}, Ranks()),
        ({"WORLD_SIZE": "", "RANK": ""}, Ranks()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Ranks()),
        ({"RANK": "1", "WORLD_SIZE": "2", **MEET}, Ranks(1, 2, "node1:29511")),
        ({"SLURM_STEP_NUM_TASKS": "1"}, Ranks()),
        (
            {"SLURM_STEP_NUM_TASKS": "2", "RANK": "0", "WORLD_SIZE": "2", **MEET},
            Ranks(0, 2, "node1:29511"),
        ),
    ],
)
def test_a_job_is_what_the_environment_says(environment, expected):
    assert ranks_of(environment) == expected


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but RANK is not set: start with torchrun (--nproc-per-"
         "node 2), or unset WORLD_SIZE"),
        ({"WORLD_SIZE": "2", **MEET}, "WORLD_SIZE=2, but RANK is not set"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0, but RANK is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: must be a whole number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1: must be a whole number"),
        ({"RANK": "1"}, "RANK=1, but WORLD_SIZE is not set: start with torchrun, or unset RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2", **MEET}, "RANK=2, but WORLD_SIZE is 2"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK=1 of WORLD_SIZE=2, but MASTER_ADDR and MASTER_"
         "PORT not set"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS=4, but RANK is not set: each task "),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2, but RANK is not set"),
    ],
)  # fmt: skip
def test_an_environment_that_fits_no_job_is_refused(environment, says):
    with pytest.raises(RanksError) as caught:
        ranks_of(environment)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


@pytest.fixture
def listener(monkeypatch) -> Iterator[socket.socket]:
    """A socket that listens, in the way of others; what is waited for is said at once."""
    monkeypatch.setattr(ranks, "PATIENCE_S", 0.05)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken


def meet(ranks: Ranks, port: int, seconds: float = 60) -> None:
    """In torch's store; rank 0 may listen at any port: 0."""
    TCPStore("127.0.0.1", port, ranks.size, ranks.rank == 0, timedelta(seconds=seconds))


def wait_in_vain(alone: Ranks, port: int, said: Queue[str]) -> None:
    """Meets nobody. The thread that says so may come to its turn after the store has given up."""
    with joining(alone, said.put):
        try:
            meet(alone, port, seconds=0.3)
        finally:
            said.put(said.get(timeout=PATIENCE))


def test_a_rank_that_waits_says_for_whom(listener):
    port = listener.getsockname()[1]
    said: Queue[str] = Queue()
    for rank in (1, 0):
        with pytest.raises(JoinError) as caught:
            wait_in_vain(Ranks(rank, 2, f"127.0.0.1:{port}"), port if rank else 0, said)
        assert str(caught.value).startswith(
            f"rank {rank} waited in vain for 2 ranks at 127.0.0.1:{port}: start all ranks within"
        )
        assert "\n" not in str(caught.value)
        assert said.get_nowait() == f"rank {rank} waits for 2 ranks at 127.0.0.1:{port}"
        assert said.empty()


def test_a_port_that_is_taken_is_named(listener):
    listener.listen()
    port = listener.getsockname()[1]
    first = Ranks(0, 2, f"127.0.0.1:{port}")
    taken = f"MASTER_PORT={port}: another process listens there"
    with pytest.raises(JoinError, match=taken), joining(first, lambda line: None):
        meet(first, port)


def test_a_job_that_is_whole_says_nothing(listener, monkeypatch):
    said: list[str] = []
    with joining(Ranks(0, 1, "127.0.0.1:0"), said.append):
        meet(Ranks(), 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(JoinError), joining(Ranks(1, 2, "127.0.0.1:1"), said.append):
        raise RuntimeError("timed out")
    assert said == []
    with pytest.raises(RuntimeError, match=r"^out of memory$"), joining(Ranks(), said.append):
        raise RuntimeError("out of memory")
