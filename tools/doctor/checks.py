"""Finds what a machine has, and what is wrong with it: packages, devices, attention, memory,
media."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from data_pipeline import cgroups, devices, npu
from data_pipeline.attention_kinds import INFERENCE, KINDS, NPU, PLACES, able, kinds_of, missing
from data_pipeline.kernel_proof import cache_folder
from moss_train import hardware
from moss_train.model_config import ModelConfig

PROJECT = "moss-train"
OPTIONAL = {  # what is better with it, and how it is installed
    "triton": ("kernels of decoding and flex attention on a GPU", "pip install triton"),
    "flash-attn": ("model.attention=flash, --attention=flash", f"pip install '{PROJECT}[flash]'"),
    "transformer-engine": ("model.attention=te", f"pip install '{PROJECT}[te]'"),
    "torch-npu": ("inference on an Ascend NPU", f"pip install '{PROJECT}[npu]'"),
    "compressed-tensors": ("exports made with --quantize", f"pip install '{PROJECT}[quantized]'"),
    "llguidance": ("answers of a JSON Schema", f"pip install '{PROJECT}[serve]'"),
}
CODECS = ("h264", "hevc", "vp9", "av1", "mjpeg")  # of videos as people have them
SHARED = 1 << 30  # bytes of /dev/shm: batches go from loaders to ranks through it
FILES = 4096  # that a process may have open: each connection, shard and worker has some
SMALL_DISK = 10 << 30  # bytes


@dataclass
class Findings:
    """The findings of a machine."""

    rows: list[tuple[str, str]] = field(default_factory=list)  # (what, what there is)
    faults: list[tuple[str, str]] = field(default_factory=list)  # (what is wrong, what mends it)

    def add(self, what: str, found: str) -> None:
        """Adds a row."""
        self.rows.append((what, found))

    def fault(self, wrong: str, mend: str) -> None:
        """Adds a fault, and what mends it."""
        self.faults.append((wrong, mend))


def packages(found: Findings) -> None:
    """Checks versions of packages against those that the project needs."""
    for requirement in _requirements():
        have = _version(requirement.name)
        if have is None:
            found.fault(f"{requirement.name} is not installed", f"pip install '{requirement}'")
        elif not requirement.specifier.contains(have, prereleases=True):
            found.fault(f"{requirement.name} is {have}", f"pip install '{requirement}'")
    for name in ("torch", "megatron-core", "transformers"):
        found.add(name, _version(name) or "not installed")
    for name, (what, how) in OPTIONAL.items():
        have = _version(name)
        found.add(name, have or f"not installed: no {what} ({how})")


def _requirements() -> Iterator[Requirement]:
    try:
        lines = requires(PROJECT) or []
    except PackageNotFoundError:  # a folder of files alone
        return
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def machine(found: Findings) -> None:
    """Reports devices, memory, disk, and the limits of a process."""
    for kind in devices.ACCELERATORS:
        for number in range(devices.count(kind)):
            device = devices.select(kind, number)
            free = devices.free_memory(device) / 1e9
            found.add(f"{kind}:{number}", f"{devices.name(device)}, {free:.1f} GB are free")
    if npu.broken is not None:
        found.fault(
            f"torch_npu cannot be imported: {npu.broken}",
            "source CANN's set_env.sh, or pip uninstall torch-npu",
        )
    found.add("device=auto", f"{devices.best()}, torch is built for {devices.runtime()}")
    free, most = cgroups.free_memory() / 1e9, cgroups.memory() / 1e9
    found.add("CPU", f"{cgroups.cores()} cores, {free:.1f} of {most:.1f} GB")
    _shared_memory(found)
    _folders(found)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found.add("open files", f"{soft} of {hard}")
    if soft < FILES:
        found.fault(f"a process may open {soft} files only", f"ulimit -n {min(FILES, hard)}")


def _shared_memory(found: Findings) -> None:
    path = Path("/dev/shm")
    if not path.is_dir():
        return
    size = shutil.disk_usage(path).total
    found.add("/dev/shm", f"{size / 1e9:.1f} GB")
    if size < SHARED:
        found.fault(
            f"/dev/shm has {size / 1e6:.0f} MB: loaders hand over batches through it",
            "docker run --shm-size=8g (or --ipc=host)",
        )


def _folders(found: Findings) -> None:
    free = shutil.disk_usage(".").free
    found.add("disk, here", f"{free / 1e9:.1f} GB are free")
    if free < SMALL_DISK:
        found.fault(f"the disk here has {free / 1e9:.1f} GB free", "start in another folder")
    cache = cache_folder()
    nearest = next(path for path in (cache, *cache.parents) if path.exists())
    if not os.access(nearest, os.W_OK):
        found.fault(f"{cache} cannot be written", "set XDG_CACHE_HOME to a folder that can")


def attention(found: Findings) -> None:
    """Reports which attention and kernels run here, and why, for the sizes of 11B in bf16."""
    model = ModelConfig()
    training = model.attention_needs(hardware.kind_of("auto"))
    inference = replace(training, use=INFERENCE, device=devices.best())
    uses = (
        ("model.attention", training, "is tried against sdpa"),
        ("--attention", inference, "runs if asked for"),
    )
    for what, needs, able_to in uses:
        for name in kinds_of(needs.use):
            reasons = missing(name, needs)
            where = "" if KINDS[name].places(needs.use) == PLACES else _where(name, needs.use)
            runs = "runs" if name == "sdpa" else able_to
            state = f"not used: {'; '.join(reasons)}" if reasons else f"{runs}{where}"
            found.add(f"{what}={name}", state)
            if not reasons:
                _import(found, name)
    trained = "the fastest of those that compute what sdpa does" if able(training)[1:] else "sdpa"
    found.add("model.attention=auto", trained)
    found.add("--attention=auto", NPU if NPU in able(inference) else "sdpa")
    triton = devices.has_triton(torch.device(devices.best()))
    kernels = "those that compute what torch does" if triton else "plain torch"
    found.add("kernels of decoding", kernels)


def _where(name: str, use: str) -> str:
    return f" ({' and '.join(KINDS[name].places(use))}; sdpa elsewhere)"


def _import(found: Findings, name: str) -> None:
    kind = KINDS[name]
    try:
        import_module(kind.module)
    except Exception as error:  # of a build for another torch or CUDA: whatever it raises
        found.fault(
            f"{kind.package} cannot be imported: {error}",
            f"pip install --force-reinstall --no-cache-dir '{kind.install}', or uninstall it",
        )


def media(found: Findings) -> None:
    """Checks whether the usual codecs of videos can be decoded."""
    import av

    able = [name for name in CODECS if name in av.codecs_available]
    found.add("videos", f"PyAV {av.__version__}: {', '.join(able)}")
    lacking = [name for name in CODECS if name not in able]
    if lacking:
        found.fault(f"PyAV cannot decode {', '.join(lacking)}", "pip install --force-reinstall av")
