"""Kernels that are right, wrong in one way or another, or raise: which of them are used, and how
often they are tried."""

from __future__ import annotations

import errno
import logging
import subprocess
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from data_pipeline import devices, kernel_proof
from data_pipeline.kernel_proof import Case, Kernel, proven, remembered

CPU = torch.device("cpu")


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return (x @ weight / 8).softmax(-1)


def same(x: Tensor, weight: Tensor) -> Tensor:
    """The same, in another order of additions."""
    half = x.shape[1] // 2
    scores = x[:, half:] @ weight[half:] + x[:, :half] @ weight[:half]
    return (scores / 8).softmax(-1)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.clone()
        grad[-1] = 0
        return grad


def last_row(x: Tensor, weight: Tensor) -> Tensor:
    out = plain(x, weight)
    return torch.cat((out[:-1], 0.9 * out[-1:]))


def raises(x: Tensor, weight: Tensor) -> Tensor:
    raise RuntimeError("no kernel image is available\nfor execution on the device")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(logging.getLogger("moss_train"), "propagate", True)
    caplog.set_level(logging.INFO, "moss_train")
    return tmp_path / "moss-train"


def kernel(run: Callable[..., Tensor], tried: list[str], dtype=torch.bfloat16) -> Kernel:
    def cases() -> Iterator[Case]:
        for name, rows in (("short", 8), ("long", 256)):
            tried.append(name)
            generator = torch.Generator().manual_seed(rows)
            inputs = (torch.randn(s, generator=generator) for s in ((rows, 64), (64, 16)))
            yield Case(name, run, plain, tuple(x.to(dtype) for x in inputs))

    return Kernel("softmax(xW/8)", "64 x 16", ("torch",), (__name__,), cases)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_right_kernel_is_proven_once(dtype, caplog, cache):
    tried: list[str] = []
    assert [proven(kernel(same, tried, dtype), CPU) for _ in range(2)] == [True, True]
    assert tried == ["short", "long"]
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (last_row, "short: the output differs by"),
        (lambda x, w: plain(x, w) * 1.02, "short: the output differs by"),
        (lambda x, w: plain(WrongGradient.apply(x), w), "short: gradient 1 differs by"),
        (lambda x, w: plain(x, w) * float("nan"), "short: the output differs by nan"),
        (lambda x, w: plain(x, w)[1:], "short: the output has the shape [7, 16], torch's [8, 16]"),
        (raises, "short: RuntimeError: no kernel image is available"),
    ],
)
def test_a_wrong_kernel_is_not_used_and_not_tried_again(run, said, caplog, cache):
    tried: list[str] = []
    assert [proven(kernel(run, tried), CPU) for _ in range(2)] == [False, False]
    assert tried == ["short"]
    (file,) = cache.iterdir()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    for line in lines:
        assert line.startswith(f"softmax(xW/8) is not used on CPU: {said}")
        assert line.endswith(f"({file})")


def compiled(error: Exception) -> Callable[..., Tensor]:
    """A kernel whose compiler fails inside of torch's."""

    def run(x: Tensor, weight: Tensor) -> Tensor:
        try:
            raise error
        except Exception as inner:
            raise RuntimeError("backend='inductor' raised:") from inner

    return run


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/tmp/torchinductor/x.so"),
        MemoryError(),
        subprocess.CalledProcessError(-9, ["gcc", "x.c"]),
        subprocess.TimeoutExpired(["ptxas"], 60),
        EOFError(),  # a compiling process has gone
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("/tmp/x.c:3: fatal error: error writing to /tmp/y.s: No space left on device"),
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("hidden", [False, True])
def test_a_failure_that_may_pass_is_no_verdict(error, hidden, caplog, cache):
    def fails(x: Tensor, weight: Tensor) -> Tensor:
        raise error

    tried: list[str] = []
    assert not proven(kernel(compiled(error) if hidden else fails, tried), CPU)
    assert not list(cache.glob("*"))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("softmax(xW/8) is not used on CPU: short: ")
    assert line.endswith("(this may pass: the next start tries again)")
    assert proven(kernel(same, tried), CPU)  # once there is room again
    assert tried == ["short", "short", "long"]


def test_another_device_version_compiler_or_code_is_another_proof(monkeypatch, tmp_path):
    tried: list[str] = []
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "some_kernel.py").write_text("x = 1")

    def prove() -> int:
        tried.clear()
        made = kernel(same, tried)
        assert proven(
            Kernel(made.name, made.shapes, made.packages, (__name__, "some_kernel"), made.cases),
            CPU,
        )
        return len(tried)

    assert [prove(), prove()] == [2, 0]
    (tmp_path / "some_kernel.py").write_text("x = 2")
    assert [prove(), prove()] == [2, 0]
    monkeypatch.setattr(kernel_proof, "version", lambda package: "99")
    assert [prove(), prove()] == [2, 0]
    monkeypatch.setattr(devices, "name", lambda device: "another GPU")
    assert [prove(), prove()] == [2, 0]
    compiler = tmp_path / "cc"
    for does in ("echo some compiler 1", "echo some compiler 2", "exit 1"):
        compiler.write_text(f"#!/bin/sh\n{does}\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CC", str(compiler))
        assert [prove(), prove()] == [2, 0]
    monkeypatch.setenv("CC", str(tmp_path / "none"))  # as one that does not start
    assert prove() == 0
    headers = {"include": str(tmp_path)}
    monkeypatch.setattr(kernel_proof.sysconfig, "get_paths", lambda: headers)
    assert [prove(), prove()] == [2, 0]


def test_a_kernel_that_broke_the_device_ends_the_job_and_is_not_tried_again(monkeypatch):
    def broken(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    tried: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(devices, "name", lambda device: "CPU")
        patched.setattr(torch.cuda, "synchronize", broken)
        with pytest.raises(RuntimeError, match="has left the device unusable"):
            proven(kernel(raises, tried), torch.device("cuda", 0))
    assert not proven(kernel(raises, tried), CPU)
    assert tried == ["short"]


@pytest.mark.parametrize("damage", ["", "[", "/"])
def test_without_a_usable_cache_it_is_found_out_again(damage, cache, monkeypatch):
    measured = iter((3.5, 4.5))
    if damage == "/":  # no folder can be made there
        cache.write_text("a file")
    assert remembered(CPU, "speed", "", (), (__name__,), lambda: next(measured)) == 3.5
    if damage == "[":
        (file,) = cache.iterdir()
        file.write_text(damage)
    again = 4.5 if damage else 3.5
    assert remembered(CPU, "speed", "", (), (__name__,), lambda: next(measured)) == again


def test_out_of_memory_says_nothing_of_a_kernel(cache):
    def exhausted(x: Tensor, weight: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        proven(kernel(exhausted, []), CPU)
    assert not cache.exists()
