"""Measures how fast a machine computes, copies, and sums over its ranks, within seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch.distributed as dist

from data_pipeline import devices
from moss_train import hardware
from moss_train.processes import end_with_launcher
from tools.doctor.checks import Findings
from tools.gpu_check.preflight import ERROR, all_reduced, copies, product
from tools.preloaded import python_path

SHAPES = {True: (8192, 8192, 8192), False: (256, 512, 512)}  # of a product, on an accelerator
SIZES = {True: 256 << 20, False: 16 << 20}  # bytes that are copied and summed
RANKS = 2  # without accelerators
LIMIT_S = 120  # until local ranks must have summed


def computing(found: Findings) -> None:
    """Measures a product in bf16, against the exact one and the data sheet, and copies."""
    device = devices.find("auto")
    fast = devices.is_accelerator(device)
    rate = product(SHAPES[fast], device)
    peak = hardware.peak_tflops_of(devices.name(device)) if fast else None
    of = f" of {peak:.0f}" if peak else ""
    found.add("bf16 product", f"{rate['bf16_tflops']:.3g}{of} TFLOP/s")
    if not rate["error"] < ERROR:
        found.fault(f"a product is wrong by {rate['error']:.1e}", "this device is broken")
    elif peak and rate["bf16_tflops"] < peak / 3:
        wrong = f"products run at {rate['bf16_tflops']:.0f} of {peak:.0f} TFLOP/s"
        found.fault(wrong, "look who else uses the GPU, and at its clocks: nvidia-smi -q -d CLOCK")
    for name, speed in copies(SIZES[fast], device).items():
        found.add(f"copies {name}", f"{speed:.3g} GB/s")


def sums(found: Findings) -> None:
    """Measures an all-reduce over all local devices, or over RANKS processes on the CPU."""
    count = devices.count(hardware.TRAINS) or RANKS
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc-per-node={count}", "-m", "tools.doctor.speed"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    name = f"all-reduce, {count} ranks"
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=LIMIT_S
        )
        result = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        found.fault(f"{name}: no answer within {LIMIT_S} s", _mend())
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        found.fault(f"{name} fails: {last[:200]}", _mend())
    else:
        found.add(name, f"{result['gb_per_s']:.3g} GB/s ({result['backend']})")
        if not result["right"]:
            found.fault(f"{name}: the sum is wrong", _mend())


def _mend() -> str:
    variable = "NCCL_DEBUG=INFO" if hardware.has_accelerator() else "GLOO_SOCKET_IFNAME=lo"
    return f"try again with {variable} in the environment"


def rank() -> None:
    """Runs one rank's part of `sums`; rank 0 prints the result."""
    from data_pipeline.ranks import joining, ranks_of

    end_with_launcher()  # else ranks that hang would stay when `sums` has waited for too long
    ranks = ranks_of()
    device = devices.select(devices.best(), int(os.environ["LOCAL_RANK"]))
    with joining(ranks, lambda line: print(line, file=sys.stderr)):
        dist.init_process_group(devices.backend(device.type))
    right, speed = all_reduced(SIZES[devices.is_accelerator(device)], device)
    if ranks.rank == 0:
        print(json.dumps({"right": right, "gb_per_s": speed, "backend": dist.get_backend()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    rank()
