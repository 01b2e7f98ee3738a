"""What a step of each kind asks of a GPU, by one that is simulated: tests/simulated_cuda.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from data_pipeline import devices
from inference.engine import capture
from tests.torchrun import Result, run_ranks


class Asked(NamedTuple):
    """At most: launches of operators and graphs, copies that nobody waits for."""

    launches: int
    copies: int


# Today's figures are the bounds; a change that needs more says why. Four sessions, full rings. A
# pass, its sampling and the tower are a graph each. A frame's keys and values are written into the
# ring by operators, in which a graph would need its place; a frame that is replaced goes on being
# seen by the token before, so that it is moved after the pass.
BOUNDS = {
    "a token": Asked(13, 2),
    "a token of each": Asked(13, 2),
    "a token that is drawn": Asked(14, 2),
    "a token that is penalized": Asked(15, 3),
    "a token that is counted": Asked(15, 2),
    "a question": Asked(14, 2),
    "a frame": Asked(33, 5),
    "a frame of each": Asked(90, 14),
    "a question with a frame": Asked(33, 5),
    "a token, a frame, a question": Asked(58, 9),
}
NO_STEPS = {
    "pictures": Asked(15, 1),
    "settings": Asked(2, 1),
    "settings of a context": Asked(3, 2),
    "settings of tokens": Asked(3, 3),
}


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Result:
    out = tmp_path_factory.mktemp("device")
    return run_ranks("tests/workers/engine_device.py", 1, out=out)


@pytest.fixture(scope="module")
def seen(result: Result) -> dict:
    return result.load("seen")


def test_a_step_asks_no_more_than_its_kind_does(seen) -> None:
    assert seen.keys() == BOUNDS.keys() | NO_STEPS.keys()
    for name, bound in (BOUNDS | NO_STEPS).items():
        counts = seen[name].counts
        assert 0 < counts["launches"] <= bound.launches, name
        assert 0 < counts["copies"] <= bound.copies, name


def test_the_host_waits_once_a_step_for_its_tokens(seen) -> None:
    for name in BOUNDS:
        (place,) = seen[name].waits
        assert place.startswith("tolist at inference/engine/engine.py"), name
        assert seen[name].counts["waits"] == 1
    for name in NO_STEPS:
        assert not seen[name].waits


def test_the_thread_that_makes_it_uses_its_device(result: Result) -> None:
    """Else one on the second GPU would record graphs, and give Triton's kernels, to the first."""
    assert set(result.load("used")) == {0}


def test_graphs_that_are_released_are_freed(result: Result) -> None:
    """NCCL's communicators wait for it when they end."""
    graphs, left = result.load("released")
    assert graphs > 10
    assert left == 0


def test_graphs_are_recorded_on_their_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a process that has recorded on another one before."""
    used: list[Any] = []

    @contextmanager
    def entered(stream: Any) -> Iterator[None]:
        used.append(stream)
        yield

    fake = SimpleNamespace(
        graph_pool_handle=lambda: 1,
        Stream=lambda device: SimpleNamespace(device=device, wait_stream=lambda other: None),
        current_stream=lambda: SimpleNamespace(wait_stream=lambda other: None),
        stream=entered,
        graph=lambda graph, pool, stream: entered(stream),
    )
    monkeypatch.setattr(devices, "module", lambda kind: fake)
    monkeypatch.setattr(devices, "new_graph", lambda device: None)
    monkeypatch.setattr(capture, "_capture_stream", cache(capture._capture_stream.__wrapped__))
    second, first = torch.device("cuda:1"), torch.device("cuda:0")
    for device in (second, first, second):
        assert capture.Pool(device).capture(lambda: 3)[1] == 3
    assert [stream.device for stream in used] == [second, second, first, first, second, second]
    assert used[1] is used[5]  # one for all pools: cuBLAS keeps memory for each


def test_graphs_are_told_with_their_memory_before_and_after(result: Result) -> None:
    lines = [line for line in result.stderr().splitlines() if line.startswith("CUDA graphs")]
    assert lines[0].startswith("CUDA graphs will take about ")
    assert lines[-1].startswith("CUDA graphs have taken 0 bytes")  # of a device that is simulated
    assert len(lines) > 3  # progress between the two


def test_sessions_that_leave_no_room_for_graphs_are_refused(result: Result) -> None:
    said = result.load("refused")
    assert said.startswith("max_sessions=10: a session takes ")
    assert " for all, graphs " in said
    assert said.endswith("a smaller window or max_tokens (--max_context), or graphs=False")
