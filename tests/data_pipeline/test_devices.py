"""Which device a user gets, also where torch_npu is installed and broken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data_pipeline import devices
from tests.torchrun import REPO

BROKEN = 'raise ImportError("libhccl.so: cannot open shared object file")\n'


def test_auto_is_the_first_kind_that_is_here(monkeypatch):
    here = {"xpu", "mps"}
    monkeypatch.setattr(devices, "is_present", lambda kind: kind in here or kind == "cpu")
    assert devices.find("auto") == torch.device("xpu")
    here.clear()
    assert devices.find("auto") == torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("gpu", "allowed: auto, cuda, npu, xpu, mps, cpu, or one of several such as cuda:1"),
        ("cuda:one", "allowed: auto, cuda"),
        ("cuda:4", "this machine has 2 of them, from cuda:0"),
        ("npu", "this machine has no Ascend NPU: use cuda, or auto"),
    ],
)
def test_what_is_not_here_is_refused_with_what_is(asked, said, monkeypatch):
    monkeypatch.setattr(devices, "is_present", lambda kind: kind in ("cuda", "cpu"))
    monkeypatch.setattr(devices, "count", lambda kind: 2)
    with pytest.raises(ValueError, match=f"^--device={asked}: {said}"):
        devices.find(asked, "--device")


def test_a_process_beyond_the_last_device_is_told_how_many_there_are(monkeypatch):
    monkeypatch.setattr(devices, "count", lambda kind: 4)
    assert devices.lacking("cuda", 3) == devices.lacking("cpu", 9) == ""
    assert devices.lacking("cuda", 4) == (
        "process 4 of this machine (LOCAL_RANK) has no device of its own, it sees 4: "
        "start as many processes as it sees (--nproc-per-node 4)"
    )


def test_processes_share_the_devices_that_this_one_may_use(monkeypatch):
    monkeypatch.setattr(devices, "count", lambda kind: 2)
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    assert devices.visible("npu") == ["0", "1"]
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "5,7")
    assert devices.visible("npu") == ["5", "7"]
    assert devices.only("npu", ["7"]) == {"ASCEND_RT_VISIBLE_DEVICES": "7"}
    assert devices.only("cpu", []) == {}


def test_each_kind_is_asked_through_its_own_module(monkeypatch):
    """What holds of kinds that are not here: no more than that their module is asked."""
    told: list[object] = []
    fake = SimpleNamespace(
        synchronize=told.append,
        set_device=told.append,
        mem_get_info=lambda device: (7, 9),
        get_device_name=lambda device: f"the name of {device}",
        XPUGraph=dict,
    )
    monkeypatch.setattr(torch, "xpu", fake)
    device = devices.select("xpu", 3)
    assert told == [3]
    assert devices.free_memory(device) == 7
    assert devices.name(device) == "the name of xpu:3"
    assert devices.has_graphs(device)
    assert devices.new_graph(device) == {}
    devices.synchronize(device)
    assert told == [3, device]
    devices.use(torch.device("xpu", 1))
    devices.use(torch.device("cpu"))
    devices.use(torch.device("meta"))
    assert told == [3, device, 1]
    assert devices.backend("xpu") == "xccl"
    assert not devices.has_graphs(torch.device("cpu"))


def test_a_broken_torch_npu_stops_only_who_asks_for_it(tmp_path: Path):
    """Its entry point makes a plain `import torch` fail where its driver is missing."""
    (tmp_path / "torch_npu.py").write_text(BROKEN)
    info = tmp_path / "torch_npu-2.13.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")

    def run(code: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPO}"}
        del environment["TORCH_DEVICE_BACKEND_AUTOLOAD"]
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)

    assert "torch_npu" in run("import torch").stderr  # the package is as broken as the real one
    for room in ("data_pipeline.devices", "inference.engine.load", "moss_train.config, torch"):
        done = run(f"import {room}")
        assert done.returncode == 0, done.stderr
    asked = "from data_pipeline.devices import find; print(find('auto')); find('npu')"
    done = run(asked)
    assert done.stdout == f"{devices.best()}\n"
    said = "device=npu: torch_npu is installed and cannot be imported (libhccl.so"
    assert done.stderr.strip().splitlines()[-1].startswith(f"ValueError: {said}")
