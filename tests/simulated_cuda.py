"""A CUDA device that is simulated on the CPU: what training would ask of a GPU is seen and counted.

Tensors hold real numbers in host memory, but their storage is marked as the device's, and they say
so (`x.device`, `x.is_cuda`). Every call that makes, moves or reads tensors, and every operator, is
watched:

- an operator that gets tensors of both memories raises DeviceMixError, as CUDA would; so does a
  collective that gets a host tensor, and reading an asynchronous copy before its event has ended;
- what would make the host wait for the device is recorded, with its place in the code: reading a
  value, copying from or to pageable memory, operators whose result's size depends on values;
- operators that a device would be given, copies and collectives are counted.

Call `install` once in a process, before megatron is imported; it cannot be undone.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.simulated_operators import FREE, INDEXED, OBJECTS, UNSET, VALUE_DEPENDENT, rms_norm

ROOT = Path(__file__).resolve().parent.parent
CUDA, HOST = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten


class DeviceMixError(AssertionError):
    """What a GPU would refuse, or answer with garbage."""


class Record:
    """What was seen while it was current.

    counts: launches, collectives, asynchronous copies, waits, math (attention that keeps scores).
    waits: each wait of the host: what for, and where in the code.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def wait(self, what: str) -> None:
        self.counts["waits"] += 1
        self.waits[f"{what} at {_place()}"] += 1


class _Inside(threading.local):
    """Of a thread: > 0 inside a call that is counted as a whole (quiet); inside what gloo does
    where NCCL would do something else (transport)."""

    quiet = transport = 0


record = Record()
_inside = _Inside()
_pending: list[Any] = []  # storages of asynchronous copies to the host, without an event yet
_host_groups: set[str] = set()  # names of groups whose collectives take host tensors


def install() -> None:
    """Makes this process believe in one CUDA device."""
    from moss_train import hardware

    hardware._redirect_cuda_module()
    hardware._redirect_megatron_rng()
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.current_device = lambda: 0
    cuda.device_count = lambda: 8
    cuda.get_device_capability = lambda *_: (9, 0)  # broadcast asks for it
    cuda.synchronize = lambda *_: record.wait("torch.cuda.synchronize")
    cuda.max_memory_allocated = cuda.memory_allocated = cuda.memory_reserved = lambda *_: 0
    cuda.reset_peak_memory_stats = lambda *_: None
    cuda.Event = _Event
    _patch_tensor()
    _patch_groups()
    functions = _Functions()
    functions.__enter__()
    _Operators().__enter__()
    autograd: Any = torch.autograd
    run_backward = autograd._engine_run_backward

    def watched(*args: Any, **kwargs: Any) -> Any:
        # Torch turns the mode off in the call that it handles, here for all of a backward pass.
        if torch._C._len_torch_function_stack():
            return run_backward(*args, **kwargs)
        with functions:
            return run_backward(*args, **kwargs)

    autograd._engine_run_backward = watched


@contextmanager
def recording() -> Iterator[Record]:
    """A new record, for what happens inside."""
    global record
    before, record = record, Record()
    try:
        yield record
    finally:
        record = before


def on_device(x: Tensor) -> bool:
    """Whether `x` claims to be in the device's memory."""
    return _mark(x) == "device"


class _Event:
    """What was copied to the host before `record` may be read after `synchronize`."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.covered: list[Any] = []

    def record(self, *_: Any) -> None:
        self.covered, _pending[:] = [*_pending], []

    def elapsed_time(self, end: _Event) -> float:
        return 1.0

    def synchronize(self) -> None:
        record.wait("event")
        for storage in self.covered:
            storage.mark = "pinned"


def _mark(x: Tensor) -> str:
    return getattr(x.untyped_storage(), "mark", "host")


def _set(x: Tensor, mark: str) -> Tensor:
    x.untyped_storage().mark = mark  # type: ignore[attr-defined]
    return x


def _place() -> str:
    """The innermost frames of the code under test that are on the stack."""
    frames = [
        f"{file.relative_to(ROOT) if ROOT in file.parents else file.name}:{frame.lineno}"
        for frame in traceback.extract_stack(sys._getframe(2))
        if any(part in frame.filename for part in ("/moss_train/", "/megatron/", "/inference/"))
        for file in [Path(frame.filename)]
    ]
    return " < ".join(frames[::-1][:3])


@contextmanager
def as_one(launches: int = 0) -> Iterator[None]:
    """Operators inside are parts of a call that is counted as a whole, of so many launches."""
    record.counts["launches"] += 0 if _inside.quiet else launches
    _inside.quiet += 1
    try:
        yield
    finally:
        _inside.quiet -= 1


def _patch_tensor() -> None:
    """Attributes and methods of tensors that tell, or change, where they are."""
    tensor: Any = torch.Tensor
    real_device, real_type, real_to = tensor.device, tensor.type, tensor.to

    def to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype, wait_free = _parse_to(*args, **kwargs)
        if x.is_meta or (device is not None and device.type == "meta"):
            return real_to(x, *args, **kwargs)
        x = real_to(x, dtype) if dtype is not None and dtype != x.dtype else x
        return x if device is None else _move(x, device, wait_free)

    def pin_memory(x: Tensor, *_: Any) -> Tensor:
        if on_device(x):
            raise DeviceMixError(f"pin_memory of a device tensor at {_place()}")
        return x if _mark(x) == "pinned" else _set(x.clone(), "pinned")

    def type_(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = real_type(x, *args, **kwargs)
        if args or kwargs:
            return out
        word = out.rpartition(".")[2]
        return f"torch.cuda.{word}" if on_device(x) else f"torch.{word}"

    def reading(name: str) -> Callable:
        real = getattr(tensor, name)

        def read(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            _check_read(x, name)
            with as_one():
                return real(x, *args, **kwargs)

        return read

    tensor.device = property(lambda x: CUDA if on_device(x) else real_device.__get__(x))
    tensor.is_cuda = property(on_device)
    tensor.is_cpu = property(lambda x: not x.is_meta and not on_device(x))
    tensor.to, tensor.pin_memory, tensor.type = to, pin_memory, type_
    tensor.cuda = lambda x, *_, non_blocking=False: _move(x, CUDA, non_blocking)
    tensor.cpu = lambda x, *_: _move(x, HOST, False)
    tensor.is_pinned = lambda x, *_: _mark(x) == "pinned"
    for name in ("tolist", "numpy", "item", "__bool__", "__int__", "__float__", "__index__"):
        setattr(tensor, name, reading(name))


def _patch_groups() -> None:
    """Notes the groups that are made over gloo: their collectives take host tensors."""
    plain: Any = dist.new_group

    def new_group(*args: Any, **kwargs: Any) -> Any:
        group = plain(*args, **kwargs)
        if kwargs.get("backend") == "gloo" and isinstance(group, dist.ProcessGroup):
            _host_groups.add(group.group_name)
        return group

    dist.new_group = new_group
    work: Any = dist.Work
    plain_wait = work.wait

    def wait(*args: Any, **kwargs: Any) -> Any:
        _inside.transport += 1
        try:
            return plain_wait(*args, **kwargs)
        finally:
            _inside.transport -= 1

    work.wait = wait


def _parse_to(*args: Any, **kwargs: Any) -> tuple[torch.device | None, torch.dtype | None, bool]:
    kwargs.pop("memory_format", None)
    kwargs.pop("copy", None)
    if args and isinstance(args[0], Tensor):
        rest = bool(args[1]) if len(args) > 1 else False
        return args[0].device, args[0].dtype, kwargs.get("non_blocking", rest)
    if args and isinstance(args[0], int) and not isinstance(args[0], bool):
        args = (CUDA, *args[1:])
    device, dtype, wait_free, _ = torch._C._nn._parse_to(*args, **kwargs)
    return device, dtype, bool(wait_free)


def _move(x: Tensor, device: torch.device, wait_free: bool) -> Tensor:
    """`x` in `device`'s memory: itself, where it is there already."""
    down = on_device(x)
    if down == (device.type == "cuda"):
        return x
    with as_one():
        out = x.clone()
    _count_copy(down, wait_free, pinned=down or _mark(x) == "pinned")
    if down and wait_free:
        return _set_pending(out)
    return _set(out, "host" if down else "device")


def _set_pending(x: Tensor) -> Tensor:
    _pending.append(x.untyped_storage())
    return _set(x, "pending")


def _count_copy(down: bool, wait_free: bool, pinned: bool) -> None:
    if wait_free and pinned:
        record.counts["copies"] += 1
    else:
        memory = "" if pinned else " of pageable memory"
        record.wait(f"copy{memory} to the {'host' if down else 'device'}")


def _check_read(x: Tensor, what: str) -> None:
    if _mark(x) == "pending":
        raise DeviceMixError(f"{what}: read before the copy is known to have ended, at {_place()}")
    if on_device(x) and not _inside.quiet:
        record.wait(what)


class _Functions(TorchFunctionMode):
    """Functions that are told a device, and those that are one kernel on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name == "rms_norm":
            return rms_norm(as_one, *args, **kwargs)
        if name == "scaled_dot_product_attention":
            math = kwargs.get("attn_mask") is not None or args[0].dtype is torch.float32
            record.counts["math"] += math and bool(kwargs.get("enable_gqa"))
            with as_one(1):
                return func(*args, **kwargs)
        if kwargs.get("device") is not None and name not in ("to", "_parse_to"):
            return self._made(func, name, args, kwargs)
        if kwargs.pop("pin_memory", False):
            return _set(func(*args, **kwargs), "pinned")
        return func(*args, **kwargs)

    def _made(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """A factory that was told a device."""
        wanted, pinned = kwargs["device"], kwargs.pop("pin_memory", False)
        device = CUDA if isinstance(wanted, int) else torch.device(wanted)
        if device.type == "meta":
            return func(*args, **kwargs)
        with as_one():
            out = func(*args, **{**kwargs, "device": HOST})
        if device.type == "cpu":
            return _set(out, "pinned" if pinned else "host")
        if name in ("tensor", "as_tensor", "asarray"):
            record.wait(f"torch.{name} on the device")
            out = out.clone()
        elif name not in UNSET:
            record.counts["launches"] += 1
        return _set(out, "device")


class _Operators(TorchDispatchMode):
    """Every operator, those of backward passes too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _inside.transport:
            return func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor) and not x.is_meta]
        if func.namespace == "c10d":
            self._collective(func, leaves, tensors)
            return func(*args, **kwargs)
        packet = func._overloadpacket
        if packet is aten.copy_ and on_device(args[0]) != on_device(args[1]):
            return self._copy(func, *args, **kwargs)
        if not any(on_device(x) for x in tensors):
            return func(*args, **kwargs)
        self._check(func, packet, args, tensors)
        out = func(*args, **kwargs)
        self._count(func, packet, tensors, out)
        return out

    def _collective(self, func: Any, leaves: list[Any], tensors: list[Tensor]) -> None:
        if "barrier" in str(func):
            record.wait("barrier")
        elif any(not on_device(x) for x in tensors):
            frames = {frame.name for frame in traceback.extract_stack()}
            if frames & OBJECTS:
                record.wait("collective of objects")
            elif not self._host_group(leaves):
                raise DeviceMixError(f"{func}: a host tensor, at {_place()}")
        record.counts["collectives"] += bool(tensors)

    def _host_group(self, leaves: list[Any]) -> bool:
        boxes = [x for x in leaves if isinstance(x, torch.ScriptObject)]
        groups = [box for box in boxes if "ProcessGroup" in str(box._type())]
        return any(dist.ProcessGroup.unbox(x).group_name in _host_groups for x in groups)

    def _copy(self, func: Any, to: Tensor, source: Tensor, wait_free: bool = False) -> Tensor:
        down = on_device(source)
        # A number in host memory is a kernel's argument, unless it goes to a single place.
        if down or source.dim() > 0 or to.dim() == 0:
            _count_copy(down, wait_free, _mark(to if down else source) == "pinned")
        func(to, source)
        if down and wait_free:
            _set_pending(to)
        return to

    def _check(self, func: Any, packet: Any, args: Any, tensors: list[Tensor]) -> None:
        if packet in INDEXED and on_device(args[0]):
            # A number that is set where a mask is true is a masked_fill.
            fill = packet is not aten.index and args[2].dim() == 0 and not on_device(args[2])
            for x in args[1]:
                if x is not None and not on_device(x):
                    record.wait("index in host memory")
                elif x is not None and (x.dtype in (torch.bool, torch.uint8)) is not fill:
                    record.wait("a number at places" if fill else "mask as an index")
            tensors = [args[0]]
        for x in tensors:
            # Numbers in host memory may be among the operands.
            if not on_device(x) and (x.dim() > 0 or packet in (aten.index_select, aten.embedding)):
                raise DeviceMixError(f"{func}: a host tensor of {list(x.shape)}, at {_place()}")
        if packet in VALUE_DEPENDENT and not _inside.quiet:
            record.wait(packet.__name__)

    def _count(self, func: Any, packet: Any, tensors: list[Tensor], out: Any) -> None:
        known = {x.untyped_storage()._cdata for x in tensors}
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor) and not x.is_meta]
        new = [x for x in results if x.untyped_storage()._cdata not in known]
        for x in new:
            _set(x, "device")
        if (new or func._schema.is_mutable) and packet not in FREE and not _inside.quiet:
            record.counts["launches"] += 1
