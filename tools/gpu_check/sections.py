"""Runs the sections of a check, each a function from a device to its findings, in a process of its
own.

Every finding has "correct", which the exit code is made of; speeds never make it fail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from data_pipeline.attention_kinds import able
from moss_train.train.process import (
    leave_process_group,
    start_process_group,
    start_writer_queue,
)
from tools.differences import largest, relative
from tools.gpu_check import saving
from tools.gpu_check.cases import CASES, REHEARSED, STAGES, Case
from tools.gpu_check.preflight import preflight
from tools.gpu_check.workbench import Workbench

TOLERANCE = 1e-4  # relative difference of a loss between CPU and GPU
CPU_LOSSES, GPU_LOSSES = "losses on the CPU", "losses"
ATTENTION = "attention"
ROUNDED = 1e-2  # relative difference of a loss between kinds of attention, in bf16
# In the order of a run, with the seconds that each may take.
LIMITS = {
    "preflight": 60,
    CPU_LOSSES: 90,
    GPU_LOSSES: 90,
    ATTENTION: 120,
    "resume": 60,
    **dict.fromkeys(CASES, 120),
    "save": 150,
}


def run_section(name: str, device: str, rehearse: bool) -> dict[str, Any]:
    """The findings of a section on this process's device."""
    case = (REHEARSED if rehearse else CASES).get(name, STAGES["pt1"])
    on = "cpu" if name == CPU_LOSSES else device
    config = case.config(on, "unused")
    if rehearse:
        config.hardware.threads = 1  # more only disturb other work, with shapes as small
    start_writer_queue()
    start_process_group(config)
    try:
        return _section(name, case, on, rehearse)()
    finally:
        leave_process_group()


def _section(name: str, case: Case, device: str, rehearse: bool) -> Callable[[], dict[str, Any]]:
    if name == "preflight":
        return partial(preflight, rehearse)
    if name in (CPU_LOSSES, GPU_LOSSES):
        return partial(stage_losses, device, 2 if rehearse else None)
    if name == ATTENTION:
        return partial(attention_losses, device)
    if name == "resume":
        return partial(saving.resume, device)
    if name == "save":
        return partial(saving.save, device, rehearse)
    return lambda: Workbench(case, device, "unused").measure()


def stage_losses(device: str, steps: int | None) -> dict[str, Any]:
    """Losses of the first steps of every stage: small model, fp32."""
    losses: dict[str, list[float]] = {}
    for stage, case in STAGES.items():
        bench = Workbench(case, device, "unused")
        batch = bench.batch()
        losses[stage] = [bench.step(batch).loss for _ in range(steps or case.steps)]
    falls = all(own[-1] < own[0] for own in losses.values())
    return {"correct": falls, "losses": losses}


def attention_losses(device: str) -> dict[str, Any]:
    """Loss of a first step with each kind of attention that runs here, beside sdpa's: streams and
    packed texts, small model, bf16 (fp32 on a CPU, where sdpa is alone)."""
    case, losses, replaced = STAGES["realtime_sft"], dict[str, float](), list[str]()
    if device != "cpu":
        case = replace(case, overrides=(*case.overrides, "model.dtype=bf16"))
    for name in able(case.config(device, "unused").model.attention_needs(device)):
        own = replace(case, overrides=(*case.overrides, f"model.attention={name}"))
        bench = Workbench(own, device, "unused")
        if bench.config.model.attention != name:
            replaced.append(name)  # it did not prove right
        losses[name] = bench.step(bench.batch()).loss
    apart = relative(losses.values(), [losses["sdpa"]] * len(losses))
    correct = not replaced and apart <= ROUNDED
    return {"correct": correct, "kinds": losses, "not_right": replaced}


def compare_losses(findings: dict[str, dict[str, Any]]) -> None:
    """Compares the GPU's losses with the CPU's, in place, where both are there."""
    if not all("losses" in findings.get(name, {}) for name in (CPU_LOSSES, GPU_LOSSES)):
        return
    theirs, ours = findings[CPU_LOSSES]["losses"], findings[GPU_LOSSES]["losses"]
    worst = {stage: relative(ours[stage], theirs[stage]) for stage in theirs}
    findings[GPU_LOSSES]["apart"] = worst
    findings[GPU_LOSSES]["correct"] &= largest(worst.values()) <= TOLERANCE
