"""An import as tasks of a real Ray of two nodes, one core each."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.data_pipeline.engines.test_engines import STOP, attempts, build, start, stuck
from tests.data_pipeline.importers.jobs import blocked, contents, make_records
from tests.waiting import PATIENCE
from tools.bench.ray_nodes import add_node, ray_cluster, raylet_of

if not os.environ.get("TEST_RAY"):
    pytest.skip("a cluster takes minutes on two busy cores: make test-ray", allow_module_level=True)
pytest.importorskip("ray", reason="Ray is not installed: pip install 'moss-train[ray]'")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without cores, which nobody kills, and two nodes."""
    with ray_cluster() as started:
        for _ in range(2):
            add_node(started)
        yield started


def test_a_killed_worker_and_a_killed_node_cost_a_part(cluster: Any, tmp_path: Path) -> None:
    source = make_records(tmp_path / "in", 700)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert build(source, whole) == 0
    options = ("--engine", "ray", "--ray-address", cluster.address)
    with blocked(source.parent / f"own{STOP}.png"):
        job = start(source, out, *options)
        worker = stuck(out, set())
        os.kill(worker, signal.SIGKILL)
        second = stuck(out, {worker})
        raylet = psutil.Process(second).parent()
        assert raylet is not None
        assert raylet.name() == "raylet"
        node = next(node for node in cluster.worker_nodes if raylet_of(node) == raylet.pid)
        cluster.remove_node(node, allow_graceful=False)
        third = stuck(out, {worker, second})
        assert len({attempts(out)[pid] for pid in (worker, second, third)}) == 1
        assert psutil.Process(third).parent() != raylet
    os.kill(third, signal.SIGKILL)  # it waits at the picture for ever
    assert job.wait(PATIENCE) == 0
    assert contents(out) == contents(whole)
