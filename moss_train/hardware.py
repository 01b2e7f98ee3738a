"""The one place that knows which device this process runs on.

Everything else asks here ("is there CUDA", which device, which backend). On a machine without CUDA,
`activate_cpu` makes megatron-core run on the CPU over gloo. megatron-core names CUDA in its source
(`torch.cuda.current_device()`, `device="cuda"`, `Tensor.cuda()`), and has no public switch for it,
so the names are redirected here, once for the process.
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _device

from data_pipeline import devices
from data_pipeline.ranks import local_rank

TRAINS = "cuda"  # megatron-core's kind of accelerator
KINDS = ("auto", TRAINS, "cpu", "npu")
UNSUPPORTED = {
    "npu": "MindSpeed, by which megatron-core runs on an NPU, is written for megatron-core 0.12.1, "
    "and this needs 0.16.1 or later: train on cuda or cpu; inference runs on an NPU"
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by what configurations call them

_FACTORIES = (
    "arange", "empty", "empty_like", "full", "full_like", "ones", "ones_like",
    "rand", "randn", "tensor", "as_tensor", "zeros", "zeros_like",
)  # fmt: skip
PEAK_BF16_TFLOPS = {  # of words in a GPU's name: dense products, NVIDIA's data sheets
    "GB200": 2500.0, "B200": 2250.0, "GH200": 989.4, "H200 NVL": 835.5, "H200": 989.4,
    "H100 PCIe": 756.0, "H100 NVL": 835.5, "H100": 989.4, "A100": 312.0, "L40S": 362.0,
    "L40": 181.0, "L4": 121.0,
}  # fmt: skip
_cpu_active = False


def has_accelerator() -> bool:
    """Whether there is a device that training runs on beside the CPU."""
    return devices.is_present(TRAINS)


def device() -> torch.device:
    """The device of this process: its accelerator, or the CPU."""
    if has_accelerator() and not _cpu_active:
        return torch.device(TRAINS, devices.module(TRAINS).current_device())
    return torch.device("cpu")


def on_accelerator() -> bool:
    """Whether this process computes on one: what is given to it is done while the host goes on."""
    return devices.is_accelerator(device())


def device_name() -> str:
    """The GPU's name as its driver has it, or "CPU"."""
    return devices.name(device())


def peak_tflops_of(name: str) -> float | None:
    """1e12 bf16 FLOPs a second that a GPU of this name can compute; None where it is not known, as
    of a part of a GPU (`NVIDIA H100 80GB HBM3 MIG 1g.10gb`)."""
    words = f" {name.replace('-', ' ')} "
    if " MIG " in words:
        return None
    return next((peak for gpu, peak in PEAK_BF16_TFLOPS.items() if f" {gpu} " in words), None)


def peak_tflops() -> float | None:
    """1e12 bf16 FLOPs a second of this process's GPU: those of its data sheet; for one that is not
    known, those that a large product reaches. None on a CPU.
    """
    if not on_accelerator():
        return None
    return peak_tflops_of(device_name()) or _measured_tflops()


def _measured_tflops(size: int = 8192, times: int = 10) -> float:
    x = torch.randn(size, size, device=device()).bfloat16()
    begin, end = (new_event(timing=True) for _ in range(2))
    for number in range(2 * times):
        if number == times:
            begin.record()
        x @ x
    end.record()
    end.synchronize()
    return 2e-12 * size**3 * times / (begin.elapsed_time(end) / 1e3)


def activate(kind: str) -> torch.device:
    """Prepares this process for `kind`, one of KINDS.

    Raises:
        ValueError: it is not here, or training does not run on it.
    """
    kind = kind_of(kind)
    if kind == "cpu":
        activate_cpu()
        return device()
    if _cpu_active:
        raise ValueError(
            f"hardware.device={kind}: this process has worked on the CPU, which cannot be undone: "
            "start another one"
        )
    if reason := refusal(kind):
        raise ValueError(reason)
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # megatron's overlap wants it
    return devices.select(kind, local_rank())


def kind_of(device: str) -> str:
    """The kind of device that one of KINDS stands for."""
    if device != "auto":
        return device
    return TRAINS if has_accelerator() and not _cpu_active else "cpu"


def refusal(kind: str) -> str | None:
    """Why training does not run on a kind of device here; None where it does."""
    kind = kind_of(kind)
    if kind == "cpu":
        return None
    if kind in UNSUPPORTED:
        return f"hardware.device={kind}: training does not run there ({UNSUPPORTED[kind]})"
    try:
        devices.find(kind, "hardware.device")
    except ValueError as error:
        return str(error)
    reason = devices.lacking(kind, local_rank())
    return f"hardware.device={kind}: {reason}" if reason else None


def seed_everything(seed: int) -> None:
    """Seeds python, numpy and torch on this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  libraries below still draw from the global state
    torch.manual_seed(seed)


def random_state() -> torch.Tensor:
    """The state of the device's random generator."""
    return devices.module(TRAINS).get_rng_state()


def set_random_state(state: torch.Tensor) -> None:
    """The one that `random_state` has given."""
    devices.module(TRAINS).set_rng_state(state)


def make_deterministic() -> None:
    """Makes the same run give the same numbers, at some cost in speed. To be called before anything
    touches CUDA."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")  # a sum's order must not depend on message timing
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # Transformer Engine
    torch.use_deterministic_algorithms(True)
    # Else torch fills all memory that it allocates, which is a third of a step's launches.
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False


def free_memory() -> int:
    """Bytes of the GPU's memory that this process can still get: what is free, and what torch has
    taken and does not use.
    """
    return devices.free_memory(device()) + devices.unused_memory(device())


def total_memory() -> int:
    """Bytes of the memory of the device that this rank would get."""
    return devices.module(TRAINS).get_device_properties(local_rank()).total_memory


def new_event(timing: bool = False) -> Any:
    """A mark among what the accelerator is given."""
    return devices.module(device().type).Event(enable_timing=timing)


def has_fp8() -> bool:
    """Whether the GPU that this rank would get multiplies in FP8."""
    return devices.has_fp8(torch.device(TRAINS, local_rank()))


def synchronize() -> None:
    """Waits until the device has done what it was given."""
    devices.synchronize(device())


def record_allocations(most: int | None) -> None:
    """Has torch keep the last `most` allocations; None: no more. On a CPU there are none."""
    if on_accelerator():
        arguments = {"enabled": None} if most is None else {"max_entries": most}
        devices.module(device().type).memory._record_memory_history(**arguments)


def dump_allocations(path: Path) -> None:
    """Writes what `record_allocations` has seen, for docs.pytorch.org/memory_viz."""
    if on_accelerator():
        devices.module(device().type).memory._dump_snapshot(str(path))


def peak_memory_gb() -> float:
    """Peak memory of this process in GB: allocated on the GPU, or resident on a CPU."""
    if on_accelerator():
        return devices.module(device().type).max_memory_allocated() / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def reset_peak_memory() -> None:
    """`peak_memory_gb` begins anew, on an accelerator."""
    if on_accelerator():
        devices.module(device().type).reset_peak_memory_stats()


class _NoOp:
    """Stands for CUDA streams and events: every method exists and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> _NoOp:
        return self

    def __exit__(self, *args: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def _nothing() -> Callable[..., None]:
    """A new function that does nothing (dynamo wants each name of torch.cuda to be its own)."""
    return lambda *args, **kwargs: None


def activate_cpu() -> None:
    """Redirects what megatron-core asks of CUDA to the CPU. Safe to call twice."""
    global _cpu_active
    if _cpu_active:
        return
    _cpu_active = True
    # torch keeps a list of its factory functions, made on first use, by which a `torch.device`
    # context finds them: it must hold the real ones, or tensors on "meta" are allocated.
    _device._device_constructors()
    _redirect_cuda_module()
    _redirect_tensor_methods()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    _redirect_megatron_rng()


def _redirect_cuda_module() -> None:
    cuda: Any = torch.cuda
    cpu = torch.device("cpu")
    cuda.is_available = lambda: False  # whoever asks in this process should not use it either
    cuda.current_device = lambda: cpu
    cuda.device_count = lambda: 1
    for name in ("synchronize", "set_device", "empty_cache", "ipc_collect", "_lazy_init"):
        setattr(cuda, name, _nothing())
    cuda.Stream = cuda.Event = _NoOp
    cuda.stream = cuda.device = _NoOp
    cuda.current_stream = lambda *args: _NoOp()
    cuda.default_stream = lambda *args: _NoOp()
    cuda.nvtx.range_push, cuda.nvtx.range_pop = _nothing(), _nothing()
    cuda.get_rng_state = lambda *args: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.FloatTensor, cuda.HalfTensor = torch.FloatTensor, torch.HalfTensor
    cuda.BFloat16Tensor, cuda.LongTensor = torch.BFloat16Tensor, torch.LongTensor
    cuda.IntTensor, cuda.ByteTensor = torch.IntTensor, torch.ByteTensor
    cuda.DoubleTensor = torch.DoubleTensor


def _redirect_tensor_methods() -> None:
    tensor: Any = torch.Tensor
    plain_type = tensor.type
    tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = plain_type(self, *args, **kwargs)
        # The distributed optimizer compares these strings.
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    tensor.type = type_


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return wrapped


def _redirect_megatron_rng() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    module: Any = megatron_random
    module._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    module._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
