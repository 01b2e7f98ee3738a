"""Measures how fast weights are read by 1, 2, ... threads from a file that the system has in
memory.

    python -m tools.bench.load --threads 1 2 4
    python -m tools.bench.load --device cuda --gigabytes 8

A file of bf16 tensors in the sizes of the 11B model's is written and read once; then the way in
which engines load (inference/engine/staging.py) takes turns with other numbers of threads. On a CPU
the numbers go into the ring of buffers and no further; with --device an accelerator, onto it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline import devices
from data_pipeline.commands import DONE, CommandParser
from data_pipeline.commands import whole_number as whole
from data_pipeline.tables import format_table
from inference.engine.staging import THREADS, copy_all

PROGRAM = "python -m tools.bench.load"
SHAPES = ((14336, 4096), (4096, 14336), (4096, 4096), (1024, 4096), (4096,))
WHOLE_MODEL = 21.3  # GB of 11B in bf16


def write(file: Path, size: float) -> int:
    """Writes a file of about so many GB; returns its bytes."""
    tensors, total = dict[str, Tensor](), 0
    while total < size * 1e9:
        shape = SHAPES[len(tensors) % len(SHAPES)]
        made = torch.ones(shape, dtype=torch.bfloat16)
        tensors[f"{len(tensors)}"] = made
        total += made.nbytes
    save_file(tensors, file)
    return total


def seconds(file: Path, device: torch.device, threads: int) -> float:
    """Seconds that reading the file takes."""
    target = device if devices.is_accelerator(device) else torch.device("meta")

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for name in opened.keys():  # noqa: SIM118 - it is not a mapping
            source = opened.get_tensor(name)
            yield source, torch.empty_like(source, device=target)

    began = time.perf_counter()
    with safe_open(file, framework="pt") as opened:
        copy_all(pairs(), target, threads)
        devices.synchronize(device)
    return time.perf_counter() - began


def main(arguments: list[str] | None = None) -> int:
    """Prints the table."""
    options = parse(arguments)
    torch.set_num_threads(1)
    device = devices.find(options.device, "--device")
    times: dict[int, list[float]] = {threads: [] for threads in options.threads}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.safetensors"
        total = write(file, options.gigabytes)
        seconds(file, device, 1)
        order = list(times)
        for number in range(options.rounds):
            for threads in order if number % 2 == 0 else order[::-1]:
                times[threads].append(seconds(file, device, threads))
    print(table(times, total))
    return DONE


def table(times: dict[int, list[float]], total: int) -> str:
    """The table: a line for each number of threads, with the ratio to the first number in the same
    round."""
    first = next(iter(times.values()))
    lines = [["threads", "GB/s", "range", "times as fast", "range", "11B would take"]]
    for threads, durations in times.items():
        speed = [total / each / 1e9 for each in durations]
        ratio = [one / each for one, each in zip(first, durations, strict=True)]
        middle = statistics.median(speed)
        lines.append([
            str(threads), f"{middle:.2f}", f"{min(speed):.2f}-{max(speed):.2f}",
            f"{statistics.median(ratio):.2f}", f"{min(ratio):.2f}-{max(ratio):.2f}",
            f"{WHOLE_MODEL / middle:.1f} s",
        ])  # fmt: skip
    return format_table(lines, "r")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = CommandParser(PROGRAM, description=__doc__)
    add = parser.add_argument
    add("--threads", type=whole(above=0), nargs="+", default=[1, 2, THREADS], metavar="N",
        help="numbers of threads")  # fmt: skip
    add("--gigabytes", type=float, default=1.0, metavar="GB", help="size of the file")
    add("--rounds", type=whole(above=0), default=5, metavar="N", help="of all of them")
    add("--device", default="cpu", help=devices.HELP.replace("default: auto", "default: cpu"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
