"""Measures the machine: versions, memory, the speed of products and copies, and their errors."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline import devices
from data_pipeline.fp8 import multiply, round_rows
from moss_train import hardware

PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn", "triton")
# [m, k] x [k, n] of the 11B model: the tower's MLP for 16 frames, the decoder's for 4,096 tokens.
PRODUCTS = {"tower MLP": (25728, 1280, 5120), "decoder MLP": (4096, 4096, 14336)}
REHEARSED = {"tower MLP": (64, 32, 128), "decoder MLP": (32, 64, 128)}
ERROR = 2e-2  # relative, of a product in bf16


def preflight(rehearse: bool) -> dict[str, Any]:
    """The figures of the machine, to which later ones are compared."""
    device = hardware.device()
    rates = {
        name: product(shape, device)
        for name, shape in (REHEARSED if rehearse else PRODUCTS).items()
    }
    return {
        "correct": all(rate["error"] < ERROR for rate in rates.values()),
        "device": hardware.device_name(),
        "versions": versions(),
        "memory_gb": _memory_gb(device),
        "peak_tflops": hardware.peak_tflops_of(hardware.device_name()),
        "products": rates,
        "copies_gb_per_s": copies(1 << (20 if rehearse else 30), device),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if hardware.on_accelerator():
        cudnn = torch.backends.cudnn.version()
        found |= {"runtime": devices.runtime(), "cudnn": str(cudnn)}
    return found


def _memory_gb(device: torch.device) -> dict[str, float]:
    if not devices.is_accelerator(device):
        return {}
    return {"free": devices.free_memory(device) / 1e9, "total": hardware.total_memory() / 1e9}


def product(shape: tuple[int, int, int], device: torch.device) -> dict[str, float]:
    """The speed of a product in bf16 and, where the GPU can, in FP8 as `model.fp8` has it, in 1e12
    FLOP/s; and the error in bf16."""
    m, k, n = shape
    generator = torch.Generator(device).manual_seed(1)
    x, w = (
        torch.randn(size, device=device, generator=generator).bfloat16()
        for size in ((m, k), (n, k))
    )
    flop = 2e-12 * m * k * n
    rows = slice(0, 64)
    exact = x[rows].cpu().double() @ w.cpu().double().T  # not every device has doubles
    error = ((x[rows] @ w.T).cpu().double() - exact).norm() / exact.norm()
    found = {"bf16_tflops": flop / timed(device, lambda: x @ w.T), "error": float(error)}
    if devices.has_fp8(device):
        left, right = round_rows(x), round_rows(w)
        with suppress(RuntimeError):  # it may have FP8, but no scales of rows
            seconds = timed(device, lambda: multiply(left, right, None, True))
            found["fp8_tflops"] = flop / seconds
    return found


def copies(size: int, device: torch.device) -> dict[str, float]:
    """GB/s of copies of `size` bytes: on the device (read and written), and from the host."""
    there = torch.empty(size, dtype=torch.uint8, device=device)
    other, host = torch.empty_like(there), torch.empty(size, dtype=torch.uint8)
    found = {"on the device": 2e-9 * size / timed(device, lambda: other.copy_(there))}
    if devices.pins(device):
        pinned = host.pin_memory()
        found["from page-locked memory"] = 1e-9 * size / timed(device, lambda: there.copy_(pinned))
        found["from ordinary memory"] = 1e-9 * size / timed(device, lambda: there.copy_(host))
    return found


def all_reduced(
    size: int, device: torch.device, group: dist.ProcessGroup | None = None
) -> tuple[bool, float]:
    """Runs an all-reduce of `size` bytes over a group: whether the sum is right, and the GB/s of
    each rank's link (as nccl-tests count them). A collective."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    numbers = torch.full((size // 4,), float(rank + 1), device=device)
    dist.all_reduce(numbers, group=group)
    right = bool((numbers == ranks * (ranks + 1) / 2).all())
    numbers.zero_()  # which stays what it is, however often it is summed
    seconds = timed(device, lambda: dist.all_reduce(numbers, group=group), times=5)
    return right, 2e-9 * (ranks - 1) / ranks * size / seconds


def timed(device: torch.device, work: Callable[[], Any], times: int = 10, warm: int = 2) -> float:
    """Mean seconds of a call on a device, after some calls to warm up."""
    for _ in range(warm):
        work()
    devices.synchronize(device)
    started = time.perf_counter()
    for _ in range(times):
        work()
    devices.synchronize(device)
    return (time.perf_counter() - started) / times
