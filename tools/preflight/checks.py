"""Checks one rank's machine, network and storage."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from data_pipeline import devices
from data_pipeline.loader.reader import SourceReader
from data_pipeline.loader.remote import AnyShards
from data_pipeline.shards import training_shards
from data_pipeline.tokenizer_identity import identify
from moss_train import hardware
from moss_train.config import Config, to_dict
from moss_train.sources import mixed_sources
from moss_train.storage import describe_files
from moss_train.train.description import REPO, git_commit
from tools.gpu_check.preflight import (
    ERROR,
    PRODUCTS,
    REHEARSED,
    all_reduced,
    product,
    versions,
)

WRITTEN = {True: 256 << 20, False: 8 << 20}  # bytes of a rank's file, on an accelerator or not
SUMMED = {True: 256 << 20, False: 1 << 20}  # bytes of an all-reduce
SAMPLES = 8  # that a rank reads
LOOKS = 3  # at the clock: a busy machine may not let a rank look in time


@dataclass
class Findings:
    """The findings of a rank."""

    rank: int
    host: str
    node: int
    wrong: list[str] = field(default_factory=list)  # a line for each thing that makes it unfit
    same: dict[str, str] = field(default_factory=dict)  # values that all ranks must share
    speed: dict[str, float] = field(default_factory=dict)  # by name with unit; more is better
    clocks: list[float] = field(default_factory=list)  # times at which all ranks look together


def here() -> Findings:
    """Findings of this rank, still empty."""
    node = os.environ.get("GROUP_RANK", "0")
    return Findings(dist.get_rank(), socket.gethostname(), int(node))


def check(config: Config, found: Findings, begin: Callable[[str], None]) -> None:
    """Fills `found`. A collective. `begin` is called with the name of each check before it
    starts."""
    for name, work in (
        ("device", lambda: _device(found)),
        ("matrix product", lambda: _product(found)),
        ("storage", lambda: _storage(Path(config.run.dir), found)),
        ("data", lambda: _data(config, found)),
        ("versions", lambda: _versions(config, found)),
        ("all-reduce", lambda: _all_reduce(found)),
    ):
        begin(name)
        try:
            work()
        except Exception as error:  # of any kind: it is what this is for
            found.wrong.append(f"{name}: {type(error).__name__}: {error}")
    begin("clock")
    for _ in range(LOOKS):
        dist.barrier()
        found.clocks.append(time.time())


def _device(found: Findings) -> None:
    found.same["device"] = hardware.device_name()
    if hardware.on_accelerator():
        free, total = devices.free_memory(hardware.device()), hardware.total_memory()
        if free < 0.9 * total:
            used = (total - free) / 1e9
            found.wrong.append(f"device: {used:.1f} GB of its memory are taken already")


def _product(found: Findings) -> None:
    """Checks products against the exact result and the GPU's data sheet."""
    device = hardware.device()
    peak = hardware.peak_tflops_of(hardware.device_name())
    for name, shape in (REHEARSED if not devices.is_accelerator(device) else PRODUCTS).items():
        rate = product(shape, device)
        found.speed[f"{name} TFLOP/s"] = rate["bf16_tflops"]
        if not rate["error"] < ERROR:
            found.wrong.append(f"matrix product: {name}: relative error {rate['error']:.1e}")
        if peak is not None and rate["bf16_tflops"] < peak / 4:
            found.wrong.append(
                f"matrix product: {name}: {rate['bf16_tflops']:.0f} TFLOP/s of {peak:.0f}"
            )


def _storage(run: Path, found: Findings) -> None:
    """Writes a file as a rank does in a checkpoint, and reads it back with its checksum."""
    folder = next(path for path in (run, *run.absolute().parents) if path.is_dir())
    path = folder / f".preflight_{found.rank}"
    size = WRITTEN[hardware.on_accelerator()]
    content = random.Random(found.rank).randbytes(1 << 20) * (size >> 20)
    try:
        began = time.perf_counter()
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            wrote = time.perf_counter()
            if hasattr(os, "posix_fadvise"):  # else memory would be read, not storage
                with suppress(OSError):  # a file system that takes no advice is no unfit one
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began_read = time.perf_counter()
        same = path.read_bytes() == content
        read = time.perf_counter() - began_read
        first, again = (describe_files(folder, [path]) for _ in range(2))
        if not same or first != again or path.stat().st_size != size:
            found.wrong.append(f"storage: {folder} gives back other bytes than it took")
    finally:
        path.unlink(missing_ok=True)
    found.speed["write MB/s"] = size / 1e6 / (wrote - began)
    found.speed["read MB/s"] = size / 1e6 / read


def _data(config: Config, found: Findings) -> None:
    """Reads samples of each source, anywhere in its shards."""
    chance, opened = random.Random(found.rank), AnyShards(config.data.stores)
    began, size = time.perf_counter(), 0
    for source in mixed_sources(config):
        reader = SourceReader(source.name, source.path, training_shards(source.path), opened)
        for _ in range(SAMPLES):
            _, members = reader.read(chance.randrange(len(reader)))
            size += sum(map(len, members.values()))
    found.speed["data MB/s"] = size / 1e6 / (time.perf_counter() - began)


def _versions(config: Config, found: Findings) -> None:
    plain = json.dumps(to_dict(config), sort_keys=True)
    found.same |= versions()
    found.same["commit"] = json.dumps(git_commit(REPO))
    found.same["configuration"] = hashlib.sha256(plain.encode()).hexdigest()[:16]
    found.same["tokenizer"] = json.dumps(identify(config.data.tokenizer).to_dict())[:200]


def _all_reduce(found: Findings) -> None:
    """Measures all-reduces within each machine, then between machines, over one rank of each."""
    size, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    place, summed = found.rank % local, SUMMED[hardware.on_accelerator()]
    inside = range(found.rank - place, min(found.rank - place + local, size))
    across = range(place, size, local)
    for name, ranks in (("within GB/s", inside), ("between GB/s", across)):
        if len(ranks) > 1:
            group = dist.new_group(list(ranks), use_local_synchronization=True)
            right, found.speed[name] = all_reduced(summed, hardware.device(), group)
            if not right:
                found.wrong.append("all-reduce: the sum is wrong")
