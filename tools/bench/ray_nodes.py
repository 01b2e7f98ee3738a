"""Measures an import on two Ray nodes of one core each beside one node.

Records with pictures, each of which is decoded and made smaller. Both builds run on the same
cluster of this machine, whose nodes keep to a core of their own, in turns; the shards must be the
same. A build ahead of each starts the workers, which is not measured: a worker imports torch.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
from PIL import Image

from data_pipeline.commands import DONE, FAILED, CommandParser, whole_number
from data_pipeline.shards import shard_files
from data_pipeline.tables import format_table
from tools.shards.__main__ import main as shards

PROGRAM = "python -m tools.bench.ray_nodes"
ENOUGH = 1.7  # times as fast as one node
_STARTS = 4
PICTURES, SIZE, SMALLER = 16, (480, 360), 320
_LITTLE: dict[str, Any] = {"object_store_memory": 80 << 20, "include_dashboard": False}
# A killed node is missed after 10 s. Without the last one workers run at niceness 15: beside other
# loads they get next to nothing.
_CONFIG = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500,
           "health_check_failure_threshold": 20, "worker_niceness": 0}  # fmt: skip


@contextmanager
def ray_cluster() -> Iterator[Any]:
    """Starts a Ray cluster, whose head has no cores."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        _started(cluster, num_cpus=0, _system_config=_CONFIG)
        yield cluster
    finally:
        cluster.shutdown()


def add_node(cluster: Any, core: int | None = None) -> Any:
    """Starts a node that runs one task at a time, on the core `core`."""
    node = _started(cluster, num_cpus=1)
    if core is not None:
        raylet = psutil.Process(raylet_of(node))
        for process in (raylet, *raylet.children(recursive=True)):
            process.cpu_affinity([core])
    return node


def _started(cluster: Any, **arguments: Any) -> Any:
    """A new node. A busy machine may need several tries: Ray gives a node up after 30 s."""
    before = _raylets()
    for _ in range(_STARTS - 1):
        try:
            return cluster.add_node(**arguments, **_LITTLE)
        except Exception:  # of that very class
            for late in _raylets() - before:
                late.kill()
    return cluster.add_node(**arguments, **_LITTLE)


def _raylets() -> set[psutil.Process]:
    return {child for child in psutil.Process().children() if child.name() == "raylet"}


def raylet_of(node: Any) -> int:
    """The process that starts a node's workers."""
    return int(node.all_processes["raylet"][0].process.pid)


def make_source(folder: Path, records: int) -> Path:
    """Writes records that share PICTURES pictures of noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(PICTURES):
        pixels = rng.integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png", compress_level=1)
    with (folder / "records.jsonl").open("w") as file:
        for n in range(records):
            turns = [
                {"role": "user", "content": "<|image|>?"},
                {"role": "assistant", "content": f"Answer {n}"},
            ]
            file.write(json.dumps({"messages": turns, "images": [f"{n % PICTURES}.png"]}) + "\n")
    return folder / "records.jsonl"


def build(source: Path, out: Path, address: str, parts: int) -> float:
    """Builds; returns the seconds, without the start of the command."""
    began = time.perf_counter()
    code = shards(["build", str(source), str(out), "--engine", "ray", "--ray-address", address,
                   "--parts", str(parts), "--max-side", str(SMALLER)])  # fmt: skip
    if code != DONE:
        raise SystemExit(f"the build ended with exit code {code}")
    return time.perf_counter() - began


@contextmanager
def _driver(cluster: Any) -> Iterator[None]:
    """The driver that all builds share: nodes have workers of their own for each driver."""
    import ray

    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def measure(folder: Path, source: Path, parts: int, rounds: int) -> list[tuple[float, float]]:
    """Seconds of each round with one node, and with two."""
    little, found = make_source(folder / "little", 256), []
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit(f"{PROGRAM}: two cores are needed")
    with ray_cluster() as cluster, _driver(cluster):
        add_node(cluster, cores[0])
        for number in range(rounds):
            seconds = []
            for nodes in (1, 2):
                node = add_node(cluster, cores[1]) if nodes == 2 else None
                cluster.wait_for_nodes()
                name = f"{number}-{nodes}"
                build(little, folder / f"warm-{name}", cluster.address, 4)
                seconds.append(build(source, folder / f"out-{name}", cluster.address, parts))
                if node is not None:
                    cluster.remove_node(node)
            one, two = seconds
            found.append((one, two))
            print(f"round {number + 1}: one node {one:.1f} s, two {two:.1f} s", file=sys.stderr)
    return found


def same(folder: Path) -> bool:
    """Whether all builds have the same shards, byte for byte."""
    made = [
        {shard.name: shard.read_bytes() for shard in shard_files(out / "image")}
        for out in sorted(folder.glob("out-*"))
    ]
    return all(one == made[0] for one in made)


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; returns 1 where two nodes are less than ENOUGH times as fast as one."""
    parser = CommandParser(PROGRAM, description=__doc__)
    number = whole_number(above=0)
    parser.add_argument("--records", type=number, default=3200, metavar="N", help="with a picture")
    parser.add_argument("--parts", type=number, default=32, metavar="N", help="of each build")
    parser.add_argument("--rounds", type=number, default=3, metavar="N", help="of both")
    args = parser.parse_args(arguments)
    began = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = make_source(folder / "in", args.records)
        pairs = measure(folder, source, args.parts, args.rounds)
        alike = same(folder)
    ratio = median(one / two for one, two in pairs)
    rows = [["nodes", "s", "records/s"]]
    for nodes, seconds in zip(("1", "2"), zip(*pairs, strict=True), strict=True):
        rows.append([nodes, f"{median(seconds):.1f}", f"{args.records / median(seconds):.0f}"])
    print(format_table(rows))
    print(f"two nodes / one: {ratio:.2f} times as fast ({min(o / t for o, t in pairs):.2f}-"
          f"{max(o / t for o, t in pairs):.2f}); the same shards: {'yes' if alike else 'NO'}; "
          f"load before {began:.1f}, after {os.getloadavg()[0]:.1f}")  # fmt: skip
    return DONE if alike and ratio >= ENOUGH else FAILED


if __name__ == "__main__":
    sys.exit(main())
