"""The doctor's page: what is here, and what is wrong with it, with the mend."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections import namedtuple
from importlib.metadata import version

import torch

from data_pipeline import npu
from tests.moss_train.train.runs import is_running
from tests.torchrun import REPO, free_port
from tests.waiting import until
from tools.doctor import checks, speed
from tools.doctor.__main__ import main

Usage = namedtuple("Usage", "total used free")


def test_a_machine_that_is_well_gets_a_page_and_no_fault(monkeypatch, capsys):
    # Other work may have filled this one's disk.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 0, 1 << 40))
    assert main(["--quick", "--json"]) == 0
    page = json.loads(capsys.readouterr().out)
    rows = dict(page["rows"])
    assert rows["torch"] == version("torch")
    assert rows["megatron-core"] == version("megatron-core")
    if not torch.cuda.is_available():
        assert rows["device=auto"].startswith("cpu")
        assert rows["model.attention=flash"] == "not used: runs on cuda, not on cpu"
        assert rows["--attention=npu"] == "not used: runs on npu, not on cpu"
        assert rows["model.attention=sdpa"] == "runs"
    assert page["faults"] == []


def test_each_fault_has_its_mend(monkeypatch, capsys):
    real = checks.version
    monkeypatch.setattr(checks, "version", lambda n: "2.5.1" if n == "torch" else real(n))
    monkeypatch.setattr(npu, "broken", "libhccl.so: cannot open shared object file")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 65536))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64 << 20, 0, 64 << 20))
    assert main(["--quick"]) == 1
    page = capsys.readouterr().out
    for wrong, mend in (
        ("torch is 2.5.1", "pip install 'torch>=2.6'"),
        ("torch_npu cannot be imported: libhccl.so: cannot open shared object file",
         "source CANN's set_env.sh, or pip uninstall torch-npu"),
        ("/dev/shm has 67 MB: loaders hand over batches through it",
         "docker run --shm-size=8g (or --ipc=host)"),
        ("a process may open 256 files only", "ulimit -n 4096"),
    ):  # fmt: skip
        assert f"wrong: {wrong}\n  mend: {mend}\n" in page
    assert "\n5 faults" in page


def test_local_ranks_sum_and_products_are_right():
    found = checks.Findings()
    speed.sums(found)
    speed.computing(found)
    assert found.faults == []
    (sums,) = (value for what, value in found.rows if what.startswith("all-reduce, "))
    assert float(sums.split(" GB/s (")[0]) > 0


def test_ranks_that_hang_end_with_their_launcher():
    """`sums` kills torchrun when its time is over: ranks that hang in a sum, each in a session of
    its own, would keep their GPUs."""
    port = free_port()
    job = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
           "TORCHELASTIC_RUN_ID": "hang"}  # fmt: skip
    rank = f"{sys.executable} -m tools.doctor.speed & echo $!; wait"
    launcher = subprocess.Popen(
        ["sh", "-c", rank], cwd=REPO, env={**os.environ, **job}, stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    pid = int(launcher.stdout.readline())
    try:
        until(lambda: _listens(port))  # it waits for the other one
        launcher.kill()
        launcher.wait()
        until(lambda: not is_running(pid))
    finally:
        launcher.kill()
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
