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

if not os.environ.get("TEST_RAY"):
    pytest.skip("a cluster takes minutes on two busy cores: make test-ray", allow_module_level=True)
pytest.importorskip("ray", reason="Ray is not installed: pip install 'moss-train[ray]'")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without cores, which nobody kills, and two nodes."""
    from ray.cluster_utils import Cluster

    soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500,
            "health_check_failure_threshold": 4}  # fmt: skip
    little: dict[str, Any] = {"object_store_memory": 80 << 20, "include_dashboard": False}
    started = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": soon, **little}
    )
    for _ in range(2):
        started.add_node(num_cpus=1, **little)
    yield started
    started.shutdown()


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
        node = next(node for node in cluster.worker_nodes if _raylet(node) == raylet.pid)
        cluster.remove_node(node, allow_graceful=False)
        third = stuck(out, {worker, second})
        assert len({attempts(out)[pid] for pid in (worker, second, third)}) == 1
        assert psutil.Process(third).parent() != raylet
    os.kill(third, signal.SIGKILL)  # it waits at the picture for ever
    assert job.wait() == 0
    assert contents(out) == contents(whole)


def _raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)
