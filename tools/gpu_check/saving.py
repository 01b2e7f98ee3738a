"""Save and resume: whether it goes on with the same numbers, and how long a save takes."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from moss_train import hardware
from moss_train.train.checkpoint import Checkpointer
from tools.gpu_check.cases import RESUMED, SAVED, Case
from tools.gpu_check.workbench import Workbench


def resume(device: str) -> dict[str, Any]:
    """Two steps, saved, two more; and a new model that loads what was saved and does the same."""
    with tempfile.TemporaryDirectory() as folder:
        first = Workbench(RESUMED, device, folder)
        batch = first.batch()
        for _ in range(2):
            first.step(batch)
        _save(first, 2)
        expected = [first.step(batch).loss for _ in range(2)]
        again = Workbench(RESUMED, device, folder)
        saved = Path(folder) / "checkpoints" / "step_00000002"
        _checkpointer(again).load(saved)
        again.state.set_step(2)
        found = [again.step(batch).loss for _ in range(2)]
    return {"correct": found == expected, "losses": expected, "resumed": found}


def save(device: str, rehearse: bool) -> dict[str, Any]:
    """Seconds of saving the cut 11B model, 3.0 B parameters with Adam's state, on one rank."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench(_small(SAVED) if rehearse else SAVED, device, folder)
        bench.step(bench.batch())
        hardware.synchronize()
        seconds = _save(bench, 1)
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        gb = sum(path.stat().st_size for path in files) / 1e9
        free = shutil.disk_usage(folder).free / 1e9
    return {"correct": gb > 0, "save_s": seconds, "written_gb": gb, "free_gb_then": free}


def _small(case: Case) -> Case:
    return Case(case.stage, "tiny", case.samples, case.micro, steps=1)


def _save(bench: Workbench, step: int) -> float:
    checkpointer = _checkpointer(bench)
    checkpointer.open_folder()
    started = time.perf_counter()
    checkpointer.save(step, step * len(bench.case.samples), None)
    checkpointer.close()
    return time.perf_counter() - started


def _checkpointer(bench: Workbench) -> Checkpointer:
    return Checkpointer(bench.config, bench.model, bench.state, tokenizer=None)
