"""Checks that a run that is saved and resumed goes on with the same numbers; times a save."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from moss_train import hardware
from moss_train.train.checkpoint import Checkpointer
from tools.gpu_check.cases import ASYNC, RESUMED, SAVED, Case
from tools.gpu_check.workbench import Workbench


def resume(device: str) -> dict[str, Any]:
    """Does two steps, a save, and two more while it is written; then a new model loads it, and must
    do the same two."""
    with tempfile.TemporaryDirectory() as folder:
        first = Workbench(RESUMED, device, folder)
        batch = first.batch()
        for _ in range(2):
            first.step(batch)
        checkpointer = _begin_save(first, 2)
        expected = [first.step(batch).loss for _ in range(2)]
        checkpointer.close()
        again = Workbench(RESUMED, device, folder)
        saved = Path(folder) / "checkpoints" / "step_00000002"
        _checkpointer(again).load(saved)
        again.state.set_step(2)
        found = [again.step(batch).loss for _ in range(2)]
    return {"correct": found == expected, "losses": expected, "resumed": found}


def save(device: str, rehearse: bool) -> dict[str, Any]:
    """Seconds of saving the cut 11B model, 3.0 B parameters with Adam's state, on one rank: until
    training can go on, and until all is on disk."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench(_small(SAVED) if rehearse else SAVED, device, folder)
        bench.step(bench.batch())
        hardware.synchronize()
        started = time.perf_counter()
        checkpointer = _begin_save(bench, 1)
        waits = time.perf_counter() - started
        checkpointer.close()
        seconds = time.perf_counter() - started
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        gb = sum(path.stat().st_size for path in files) / 1e9
        free = shutil.disk_usage(folder).free / 1e9
    return {"correct": gb > 0, "save_wait_s": waits, "save_s": seconds, "written_gb": gb,
            "free_gb_then": free}  # fmt: skip


def _small(case: Case) -> Case:
    return Case(case.stage, "tiny", case.samples, case.micro, ASYNC, steps=1)


def _begin_save(bench: Workbench, step: int) -> Checkpointer:
    """Saves until training can go on; the result's `close` waits for the rest."""
    checkpointer = _checkpointer(bench)
    checkpointer.open_folder()
    checkpointer.save(step, step * len(bench.case.samples), None)
    return checkpointer


def _checkpointer(bench: Workbench) -> Checkpointer:
    return Checkpointer(bench.config, bench.model, bench.state, tokenizer=None)
