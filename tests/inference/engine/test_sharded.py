"""Two real processes that share a model against one."""

from __future__ import annotations

import queue
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from inference.engine.lifeline import LOOPBACK, NUMBER, Lifeline
from inference.engine.sharded import join
from inference.engine.tensor_parallel import shard
from tests.inference.tiny import tiny_model
from tests.torchrun import UNKILLED, run_ranks
from tests.waiting import PATIENCE
from tests.workers.sharded import scenario

WORKER = "tests/workers/sharded.py"


def test_two_ranks_stream_what_one_does(tiny: Path, tmp_path: Path) -> None:
    one = scenario(str(tiny))
    two = run_ranks(WORKER, 2, str(tiny), "follow", out=tmp_path).load()
    for wanted, got in zip(one["logits"], two["logits"], strict=True):
        assert wanted.keys() == got.keys()
        assert len(wanted) > 5
        for i, logits in wanted.items():
            torch.testing.assert_close(got[i], logits, atol=1e-4, rtol=0)
    assert one["sampled"] == two["sampled"]
    assert two["freed"]
    # A message of numbers, and a tensor where there is one: nothing is pickled between two tokens.
    assert two["messages"] == {
        "a token": ["STEP", "broadcast"],
        "a picture": ["ENCODE", "broadcast", "broadcast"],
        "a frame": ["STEP", "broadcast", "broadcast"],
        "a mask": ["STEP", "broadcast", "broadcast"],
        "a long prompt": ["STEP", "broadcast", "broadcast"],
    }
    # A session that two ranks saved is one that a single process could take.
    for name, tensor in one["state"].items():
        torch.testing.assert_close(two["state"][name], tensor, atol=1e-4, rtol=1e-4)


def test_a_dead_rank_ends_all(tiny: Path, tmp_path: Path) -> None:
    """And not because torchrun kills them: that would take longer than the test does."""
    result = run_ranks(WORKER, 2, str(tiny), "die", out=tmp_path, check=False, env=UNKILLED)
    assert result.returncode != 0
    assert "rank 1 of 2 has ended: rank 0 ends, too" in result.stderr(0)
    assert not list(tmp_path.glob("result*"))


def test_graphs_that_fail_on_one_rank_are_left_out_on_all(tiny: Path, tmp_path: Path) -> None:
    """And no rank waits for another in a collective of one: 10 minutes, over NCCL."""
    result = run_ranks(WORKER, 2, str(tiny), "capture", out=tmp_path)
    assert result.load_all("graphs") == [[0, 0, 0], [0, 0, 0]]
    lines = [line for line in result.stderr(0).splitlines() if "no graphs" in line]
    assert lines == [
        "no graphs: passes run without them: rank 1: operation not permitted when stream is "
        "capturing",
        "no graphs: frames run without them: rank 1: the graph of 8 frames is off by "
        + lines[1].rpartition(" ")[2],
    ]
    assert "no graphs" not in result.stderr(1)
    # A kernel that one rank is without is used on none.
    said = [result.stderr(rank).count("rank 1 is without the kernel swiglu") for rank in (0, 1)]
    assert said == [1, 0]
    # Rank 0 ends in the middle of a step: its thread first, then the other rank.
    assert "Traceback" not in result.stderr(0) + result.stderr(1)


@pytest.mark.parametrize("failed", [0, 1])
def test_a_rank_on_which_a_pass_fails_while_it_is_captured_ends_all(
    tiny: Path, tmp_path: Path, failed: int
) -> None:
    """Although the others wait for it in that pass."""
    part, other = f"pass{failed}", 1 - failed
    result = run_ranks(WORKER, 2, str(tiny), part, out=tmp_path, check=False)
    assert result.returncode != 0
    assert "the pass itself fails" in result.stderr(failed)
    assert f"rank {failed} of 2 has ended: rank {other} ends, too" in result.stderr(other)


def test_a_model_of_ranks_that_is_forgotten_frees_them_and_a_copy_ends_alone(
    tiny: Path, tmp_path: Path
) -> None:
    result = run_ranks(WORKER, 2, str(tiny), "forget", out=tmp_path, preloaded=False)
    assert result.load("forgotten") == "str"
    assert result.load("over", rank=1)
    assert "Traceback" not in result.stderr(0) + result.stderr(1)


def test_who_is_no_rank_is_turned_away() -> None:
    told: queue.Queue[tuple[list[int], socket.socket]] = queue.Queue()

    def give(numbers: Sequence[int]) -> list[int]:
        stranger = socket.create_connection((LOOPBACK, numbers[0]))
        stranger.sendall(NUMBER.pack(1) + NUMBER.pack(numbers[1] + 1))
        told.put((list(numbers), stranger))
        return list(numbers)

    with ThreadPoolExecutor() as pool:
        first = pool.submit(Lifeline, 0, 2, give, LOOPBACK)
        numbers, stranger = told.get(timeout=PATIENCE)
        second = Lifeline(1, 2, lambda _: numbers, LOOPBACK)
        ends = first.result(PATIENCE), second
    with stranger:
        assert stranger.recv(1) == b""
    for end in ends:  # in any order
        end.close()


@pytest.mark.parametrize(("kind", "backend"), [("npu", "hccl"), ("cuda", "nccl"), ("cpu", "gloo")])
def test_ranks_meet_by_the_backend_of_their_device(kind, backend, monkeypatch) -> None:
    """Not of the best that the machine has."""
    met: list[str] = []
    monkeypatch.setattr("torch.distributed.init_process_group", met.append)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert join(kind) == (1, 2)
    assert met == [backend]


def test_heads_that_ranks_cannot_share_are_named() -> None:
    with pytest.raises(ValueError, match=r"3 ranks cannot share text_config.num_attention_heads=4"):
        shard(tiny_model(), 0, 3)
