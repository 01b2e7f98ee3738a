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
from typing import Any

import numpy as np
import torch
from torch.utils import _device

from data_pipeline import kernel_proof

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by what configurations call them

_FACTORIES = (
    "arange", "empty", "empty_like", "full", "full_like", "ones", "ones_like",
    "rand", "randn", "tensor", "as_tensor", "zeros", "zeros_like",
)  # fmt: skip
PEAK_BF16_TFLOPS = {  # of a word in a GPU's name: dense products, NVIDIA's data sheets
    "B200": 2250.0, "H200": 989.4, "H100 PCIe": 756.0, "H100": 989.4, "A100": 312.0, "L40S": 362.0,
    "L4": 121.0,
}  # fmt: skip
_cpu_active = False


def has_cuda() -> bool:
    """True where a CUDA device can be used."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process: its CUDA device, or the CPU."""
    if has_cuda() and not _cpu_active:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def device_name() -> str:
    """The GPU's name as its driver has it, or "CPU"."""
    return kernel_proof.device_name(device())


def peak_tflops_of(name: str) -> float | None:
    """1e12 bf16 FLOPs a second that a GPU of this name can compute; None where it is not known."""
    words = name.replace("-", " ")
    return next((peak for gpu, peak in PEAK_BF16_TFLOPS.items() if gpu in words), None)


def peak_tflops() -> float | None:
    """1e12 bf16 FLOPs a second of this process's GPU: those of its data sheet; for one that is not
    known, those that a large product reaches. None on a CPU.
    """
    if device().type == "cpu":
        return None
    return peak_tflops_of(device_name()) or _measured_tflops()


def _measured_tflops(size: int = 8192, times: int = 10) -> float:
    x = torch.randn(size, size, device=device()).bfloat16()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for number in range(2 * times):
        if number == times:
            begin.record()
        x @ x
    end.record()
    end.synchronize()
    return 2e-12 * size**3 * times / (begin.elapsed_time(end) / 1e3)


def backend(kind: str) -> str:
    """torch.distributed backend for `hardware.device` `kind` ("cpu" or "cuda")."""
    return "nccl" if kind == "cuda" else "gloo"


def activate(kind: str) -> torch.device:
    """Prepares this process for `kind`: "cpu", "cuda" or "auto".

    Raises:
        ValueError: "cuda" was asked for and there is none.
    """
    if kind == "auto":
        kind = "cuda" if has_cuda() and not _cpu_active else "cpu"
    if kind == "cuda":
        if _cpu_active:
            raise ValueError(
                "hardware.device=cuda: this process has worked on the CPU, which cannot be undone: "
                "start another one"
            )
        if not has_cuda():
            raise ValueError("hardware.device=cuda, but torch finds no CUDA device: use cpu")
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # megatron's overlap wants it
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        activate_cpu()
    return device()


def seed_everything(seed: int) -> None:
    """Seeds python, numpy and torch on this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  libraries below still draw from the global state
    torch.manual_seed(seed)


def make_deterministic() -> None:
    """The same numbers from the same run, at some cost in speed. Before anything touches CUDA."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")  # a sum's order must not depend on message timing
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # Transformer Engine
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def free_memory() -> int:
    """Bytes of the GPU's memory that this process can still get: what is free, and what torch has
    taken and does not use.
    """
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + unused


def peak_memory_gb() -> float:
    """Peak memory of this process in GB: allocated on the GPU, or resident on a CPU."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


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
