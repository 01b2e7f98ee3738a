"""The one place that names kinds of devices: which there are here, and what differs between them.

torch has a module for each (`torch.cuda`, `torch.npu`, ...) with functions of the same names, and
`torch.accelerator` for the one that a machine has. What is asked of them is asked here; others get
a `torch.device` and do not look at its type.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from data_pipeline import cgroups, npu

HOST = "cpu"
ACCELERATORS = ("cuda", "npu", "xpu", "mps")  # in the order in which `auto` looks for them
KINDS = (*ACCELERATORS, HOST)
NAMES = {"cuda": "CUDA", "npu": "Ascend NPU", "xpu": "Intel GPU", "mps": "Apple GPU", HOST: "CPU"}
BACKENDS = {"cuda": "nccl", "npu": "hccl", "xpu": "xccl"}  # of collectives; others: gloo
# Environment variables that limit a process to some devices.
VISIBLE = {
    "cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK",
}  # fmt: skip
EIGHT_BIT = ("cuda", HOST)  # where products with 8-bit weights have been run
GRAPHS = {"cuda": "CUDAGraph", "npu": "NPUGraph", "xpu": "XPUGraph"}  # in torch's module
PINNED = ("cuda", "npu", "xpu")  # copy from page-locked memory while the host goes on
HELP = "auto, cpu, or an accelerator: cuda, npu, xpu, mps; one of several: cuda:1 (default: auto)"
TRITON = ("cuda", "xpu")  # for which Triton's releases make kernels


def module(kind: str) -> Any:
    """torch's own of an accelerator: `torch.cuda`, `torch.npu`, `torch.xpu` or `torch.mps`."""
    return getattr(torch, kind)


def is_present(kind: str) -> bool:
    """Whether this process can use a device of that kind."""
    if kind == HOST:
        return True
    return hasattr(torch, kind) and bool(module(kind).is_available())


def count(kind: str) -> int:
    """Devices of an accelerator's kind."""
    return module(kind).device_count() if is_present(kind) else 0


def best() -> str:
    """The kind that `auto` stands for."""
    return next(filter(is_present, KINDS))


def find(device: str, field: str = "device") -> torch.device:
    """The device that a user means: `auto`, a kind, or one of several such as `cuda:1`.

    Raises:
        ValueError: it is not known or not here; names `field` and what there is.
    """
    kind, _, number = device.partition(":")
    if device == "auto":
        return torch.device(best())
    if kind not in KINDS or (number and not number.isdigit()):
        allowed = ", ".join(("auto", *KINDS))
        raise ValueError(f"{field}={device}: allowed: {allowed}, or one of several such as cuda:1")
    if kind == "npu" and npu.broken is not None:
        raise ValueError(
            f"{field}={device}: torch_npu is installed and cannot be imported ({npu.broken}): "
            "source CANN's set_env.sh, or uninstall torch_npu"
        )
    if not is_present(kind):
        raise ValueError(
            f"{field}={device}: this machine has no {NAMES[kind]}: use {best()}, or auto"
        )
    if number and kind != HOST and int(number) >= count(kind):
        raise ValueError(f"{field}={device}: this machine has {count(kind)} of them, from {kind}:0")
    return torch.device(device)


def select(kind: str, number: int) -> torch.device:
    """Makes one of several the device that this thread uses."""
    if kind in (HOST, "mps"):  # one alone
        return torch.device(kind)
    module(kind).set_device(number)
    return torch.device(kind, number)


def lacking(kind: str, number: int) -> str:
    """Why the process of that number among those of this machine has no device of its own; empty
    where it has one."""
    there = count(kind)
    if kind == HOST or number < there:
        return ""
    return (
        f"process {number} of this machine (LOCAL_RANK) has no device of its own, it sees "
        f"{there}: start as many processes as it sees (--nproc-per-node {there})"
    )


def use(device: torch.device) -> None:
    """Makes it the device that this thread uses. Each thread begins with the first of several:
    Triton's kernels and what a graph records would be given to that one.
    """
    if device.type in ACCELERATORS:  # not "meta"
        select(device.type, device.index)


def visible(kind: str) -> list[str]:
    """What this process's environment calls the accelerators that it may use; the CPU is none."""
    if kind == HOST:
        return []
    named = os.environ.get(VISIBLE.get(kind, ""), "")
    return named.split(",") if named else [str(number) for number in range(count(kind))]


def only(kind: str, names: Sequence[str]) -> dict[str, str]:
    """The environment of a process that may use these alone."""
    return {VISIBLE[kind]: ",".join(names)} if kind in VISIBLE else {}


def backend(kind: str) -> str:
    """Name of torch.distributed's backend for a kind of device."""
    return BACKENDS.get(kind, "gloo")


def name(device: torch.device) -> str:
    """The device's name, as its driver has it; "CPU"."""
    if device.type in (HOST, "mps"):
        return NAMES[device.type]
    return module(device.type).get_device_name(device)


def runtime() -> str:
    """What torch was built for."""
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs"


def is_accelerator(at: Tensor | torch.device) -> bool:
    """Whether a tensor is, or a device's tensors are, elsewhere than in the host's memory."""
    return (at.device if isinstance(at, Tensor) else at).type != HOST


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "mps":  # which is one alone
        torch.mps.synchronize()
    elif is_accelerator(device):
        module(device.type).synchronize(device)


def mark(device: torch.device) -> Any:
    """An event that the device reaches when it has done what it was given so far."""
    ours = module(device.type)
    event = ours.Event()
    event.record(ours.current_stream(device))
    return event


def pins(device: torch.device) -> bool:
    """Whether copies from page-locked memory go on while the host does."""
    return device.type in PINNED


def has_graphs(device: torch.device) -> bool:
    """Whether torch can record what the device does, and do it again."""
    kind = GRAPHS.get(device.type)
    return kind is not None and hasattr(module(device.type), kind)


def new_graph(device: torch.device) -> Any:
    """An empty recording, for the `graph` of its kind's module."""
    return getattr(module(device.type), GRAPHS[device.type])()


def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels may run there."""
    return device.type in TRITON


def has_fused_norm() -> bool:
    """Whether torch has one kernel for a root-mean-square norm; on accelerators it does."""
    return torch.version.cuda is not None and hasattr(torch.ops.aten, "_fused_rms_norm")


def has_fp8(device: torch.device) -> bool:
    """Whether its hardware multiplies in FP8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def has_eight_bit(device: torch.device) -> bool:
    """Whether weights may be kept in 8 bits there."""
    return device.type in EIGHT_BIT


def plan_attention(allowed: bool) -> bool:
    """Sets whether torch's attention may take cuDNN's kernel, which is planned for each shape: one
    switch for all threads of a process. Returns what it was."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    return before


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device; of one that shares the host's memory, in the machine."""
    if device.type in (HOST, "mps"):
        return cgroups.free_memory()
    return int(module(device.type).mem_get_info(device)[0])


def unused_memory(device: torch.device) -> int:
    """Bytes that torch has taken from the device for later, and would use first."""
    if device.type in (HOST, "mps"):
        return 0
    ours = module(device.type)
    return ours.memory_reserved(device) - ours.memory_allocated(device)


def release_memory(device: torch.device) -> None:
    """Gives back what torch holds for later."""
    if is_accelerator(device):
        module(device.type).empty_cache()


def activity(device: torch.device) -> ProfilerActivity:
    """Under which torch's profiler sees what the device does."""
    others = {"cuda": ProfilerActivity.CUDA, "xpu": ProfilerActivity.XPU}
    if device.type == "npu":
        return ProfilerActivity.PrivateUse1
    return others.get(device.type, ProfilerActivity.CPU)


def event_type(device: torch.device) -> DeviceType:
    """The type of the profiler's events of what the device did."""
    others = {"cuda": DeviceType.CUDA, "xpu": DeviceType.XPU, "npu": DeviceType.PrivateUse1}
    return others.get(device.type, DeviceType.CPU)
