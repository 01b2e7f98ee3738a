"""Compares a kernel with plain torch on a device, before its first use there.

It is compared once with plain torch, output and gradients, over the shapes that matter; the verdict
is kept in the user's cache folder by device, versions, C compiler and code. Where it fails or
differs, the caller takes the plain path, and one line says so. A failure whose cause may pass
(memory, a full disk, a compiler that was stopped) is not kept: the next start tries again.

    kernel = Kernel("FlexAttention", "heads of 128", ("torch", "triton"), (__name__,), cases)
    if proven(kernel, device):
        ...
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline import devices
from data_pipeline.atomic import write_atomically

# Below the logger of training, which is set up there; elsewhere warnings go to stderr.
log = logging.getLogger("moss_train.kernels")

Function = Callable[..., Tensor]

# Failures that say nothing of a kernel, and may be gone at the next start: exceptions, and words in
# the messages of others. Drivers and compilers have no exceptions of their own for them.
PASSING = (MemoryError, OSError, EOFError, subprocess.SubprocessError, torch.OutOfMemoryError)
PASSING_WORDS = (
    "out of memory", "cannot allocate", "alloc_failed", "allocation_failed", "no space left",
    "quota exceeded", "read-only file system", "permission denied", "too many open files",
    "input/output error", "stale file handle", "interrupted", "timed out", "busy or unavailable",
    "failed to find c compiler", "non-zero exit status", "worker process", "broken process pool",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One call of a kernel, and the same call in plain torch.

    run, plain: from `inputs` to one tensor.
    inputs: floating-point tensors on the device.
    gradients: whether those of the inputs are compared, too.
    """

    name: str
    run: Function
    plain: Function
    inputs: tuple[Tensor, ...]
    gradients: bool = True


@dataclass(frozen=True)
class Kernel:
    """What is to be proven.

    name: as a user knows it. shapes: what else tells its cases apart.
    packages: whose versions matter. modules: whose code does.
    cases: makes the cases, when they are needed.
    """

    name: str
    shapes: str
    packages: tuple[str, ...]
    modules: tuple[str, ...]
    cases: Callable[[], Iterable[Case]]


def proven(kernel: Kernel, device: torch.device) -> bool:
    """Whether it computes what plain torch does on a device. Logs one line.

    Raises:
        RuntimeError: it has left the device unusable. The verdict is kept: the next start will not
            try it.
    """
    started = time.perf_counter()
    where = _file(device, kernel.name, kernel.shapes, kernel.packages, kernel.modules)
    kept = _read(where)
    wrong, passing = (kept["wrong"], False) if kept else _first_wrong(kernel)
    if not kept and not passing:
        _write(where, {"wrong": wrong})
    machine = devices.name(device)
    if wrong:
        place = "this may pass: the next start tries again" if passing else where
        log.warning("%s is not used on %s: %s (%s)", kernel.name, machine, wrong, place)
        _check_device(kernel.name, device)
    else:
        seconds = "before" if kept else f"in {time.perf_counter() - started:.1f} s"
        log.info("%s computes what torch does on %s, compared %s", kernel.name, machine, seconds)
    return not wrong


def remembered(
    device: torch.device,
    name: str,
    shapes: str,
    packages: Sequence[str],
    modules: Sequence[str],
    measure: Callable[[], Any],
) -> Any:
    """What `measure()` once gave on a device with these versions, as JSON holds it."""
    where = _file(device, name, shapes, packages, modules)
    kept = _read(where)
    if not kept:
        kept = {"measured": measure()}
        _write(where, kept)
    return kept["measured"]


def _first_wrong(kernel: Kernel) -> tuple[str, bool]:
    """What is wrong with it, in a few words, "" where nothing is; whether that may pass."""
    case = None
    try:
        for case in kernel.cases():
            wrong = difference(case)
            if wrong:
                return f"{case.name}: {wrong}", False
    except torch.OutOfMemoryError:  # says nothing of the kernel
        raise
    except Exception as error:  # whatever a kernel of others raises: then the plain path runs
        message = str(error).strip().split("\n")[0][:160]
        passing = any(map(_may_pass, _with_causes(error)))
        return f"{case.name if case else 'no case'}: {type(error).__name__}: {message}", passing
    return "", False


def _may_pass(error: BaseException) -> bool:
    message = str(error).lower()
    return isinstance(error, PASSING) or any(words in message for words in PASSING_WORDS)


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those on the way to it: a compiler's are inside of torch's."""
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        hidden = None if error.__suppress_context__ else error.__context__
        error = error.__cause__ or hidden


def difference(case: Case) -> str:
    """How the output or a gradient is further from an exact one than torch's own; "" if none is.

    The exact ones are plain torch's on the same numbers, in fp32 (of fp32 ones, in fp64). An error
    may be twice that of torch and a quarter of the type's spacing (of fp32: 1e-5), both in its
    largest element and in the mean square: the first finds a wrong row, the second a wrong factor.
    """
    dtype = case.inputs[0].dtype
    wider = torch.float64 if dtype is torch.float32 else torch.float32
    spacing = max(torch.finfo(dtype).eps / 4, 1e-5)
    exact = _results(case, case.plain, [x.to(wider) for x in case.inputs])
    plain, found = (_results(case, f, case.inputs) for f in (case.plain, case.run))
    names = ("the output", *(f"gradient {number}" for number in range(1, len(exact))))
    for name, ours, theirs, right in zip(names, found, plain, exact, strict=True):
        if ours.shape != right.shape:
            return f"{name} has the shape {[*ours.shape]}, torch's {[*right.shape]}"
        for size in (_largest, _mean):
            scale = size(right) or 1.0
            allowed = 2 * size(theirs - right) / scale + spacing
            error = size(ours - right) / scale
            if not error <= allowed:  # nor where it is NaN
                return f"{name} differs by {error:.1e} of its size, {allowed:.1e} is allowed"
    return ""


def _results(case: Case, function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Output and gradients, for a gradient of the output that is always the same."""
    if not case.gradients:
        with torch.no_grad():
            return [function(*inputs).double()]
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    places = torch.arange(out.numel(), device=out.device).view(out.shape)
    gradient = torch.cos(places.double() % 1009).to(out.dtype)
    return [x.double() for x in (out.detach(), *torch.autograd.grad(out, leaves, gradient))]


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _mean(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _check_device(name: str, device: torch.device) -> None:
    """Raises RuntimeError where it does not work any more, as after a wrong memory access."""
    try:
        devices.synchronize(device)
    except RuntimeError as error:
        message = str(error).split("\n")[0]
        raise RuntimeError(
            f"{name} has left the device unusable ({message}): start again, it will not be used"
        ) from None


def cache_folder() -> Path:
    """Where this user's programs keep what they can find out again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moss-train"


def _file(
    device: torch.device, name: str, shapes: str, packages: Sequence[str], modules: Sequence[str]
) -> Path:
    """The file of a verdict. Its name tells shapes, device, versions, compilers and code apart."""
    exact = torch.are_deterministic_algorithms_enabled()
    parts = [
        name,
        shapes,
        devices.name(device),
        devices.runtime(),
        f"deterministic {exact}",
        compiler(),
    ]
    for package in packages:
        with suppress(PackageNotFoundError):
            parts.append(f"{package} {version(package)}")
    digest = sha256("\n".join(parts).encode())
    for module in (__name__, *modules):
        spec = find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        digest.update(Path(spec.origin).read_bytes())
    stem = "".join(sign if sign.isalnum() else "-" for sign in name)
    return cache_folder() / f"{stem}-{digest.hexdigest()[:16]}.json"


def compiler() -> str:
    """What Triton builds the callers of its kernels with: the C compiler, as it names itself, and
    Python's headers. Machines that share a home may have others, or none."""
    named = os.environ.get("CC")
    path = shutil.which(named) if named else shutil.which("gcc") or shutil.which("clang")
    version = ["no C compiler"]
    if path is not None:
        with suppress(OSError, subprocess.SubprocessError):
            command = [path, "--version"]
            result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
            version = result.stdout.splitlines()[:1]
    headers = Path(sysconfig.get_paths()["include"], "Python.h").is_file()
    return f"{' '.join(version)}, {'with' if headers else 'without'} Python.h"


def _read(where: Path) -> dict[str, Any]:
    try:
        return json.loads(where.read_text())
    except (OSError, ValueError):  # none, or half of one
        return {}


def _write(where: Path, kept: dict[str, Any]) -> None:
    with suppress(OSError):  # a home that cannot be written: it is found out again at each start
        where.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(where, json.dumps(kept) + "\n")
