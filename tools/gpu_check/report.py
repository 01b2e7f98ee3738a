"""Writes findings as tables: what is right, the steps beside those of docs/gpu.md, profiles."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.tables import format_table
from moss_train.train.trace import Profile
from tools.differences import largest
from tools.gpu_check.cases import CASES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"
HEADING = "## Last measured"
Findings = dict[str, dict[str, Any]]


def report(findings: Findings, page: str) -> str:
    """All findings as text. `page`: docs/gpu.md, whose last table the steps are compared with."""
    parts = [_verdicts(findings)]
    cases = {name: found for name, found in findings.items() if "step_s" in found}
    if cases:
        parts += [_steps(cases, last_measured(page)), *_profiles(cases)]
    return "\n\n".join(parts)


def _verdicts(findings: Findings) -> str:
    rows = [("section", "", "what was found")]
    for name, found in findings.items():
        rows.append((name, "correct" if found["correct"] else "WRONG", _words(found)))
    return format_table(rows, "l")


def _words(found: dict[str, Any]) -> str:
    if "error" in found:
        return found["error"]
    if "products" in found:
        rates = (f"{name} {p['bf16_tflops']:.3g}" for name, p in found["products"].items())
        copy = found["copies_gb_per_s"]["on the device"]
        return f"{found['device']}: {', '.join(rates)} TFLOP/s, copies {copy:.3g} GB/s"
    if "apart" in found:
        return f"largest relative difference to the CPU {largest(found['apart'].values()):.1e}"
    if "kinds" in found:
        wrong = (f"{name} is not right here" for name in found["not_right"])
        return ", ".join([*(f"{n} {loss:.4f}" for n, loss in found["kinds"].items()), *wrong])
    if "save_s" in found:
        wait = f"training goes on after {found['save_wait_s']:.3g}"
        return f"{found['written_gb']:.3g} GB in {found['save_s']:.3g} s, {wait}"
    if "step_s" in found:
        return f"loss {found['losses'][0]:.4f} to {found['losses'][-1]:.4f}"
    return ""


def _steps(cases: Findings, before: dict[str, float]) -> str:
    rows = [
        ("case", "step s", "docs/gpu.md", "frames/s", "tokens/s", "MFU", "HFU", "peak GB",
         "first s", "launches", "idle")
    ]  # fmt: skip
    for name, found in cases.items():
        profile = Profile(**found["profile"])
        rows.append(
            (name, f"{found['step_s']:.3g}", _ratio(found["step_s"], before.get(name)),
             f"{found['frames_per_s']:.1f}", f"{found['tokens_per_s']:.0f}", _share(found["mfu"]),
             _share(found["hfu"]), f"{found['peak_gb']:.1f}", f"{found['first_step_s']:.1f}",
             f"{profile.launches:,}", f"{profile.idle:.0%}")
        )  # fmt: skip
    return format_table(rows)


def _profiles(cases: Findings) -> Iterator[str]:
    for name, found in cases.items():
        profile = Profile(**found["profile"])
        rows = [(f"{name}: kernel", "ms", "share", "launches")]
        for kernel, ms, count in profile.top[:8]:
            rows.append((kernel, f"{ms:.2f}", f"{ms / profile.span_ms:.1%}", f"{count:,}"))
        yield format_table(rows, max_width=80)
        if profile.gaps:
            gaps = [("longest gap, ms", "after", "before")]
            gaps += [(f"{ms:.2f}", first, then) for ms, first, then in profile.gaps[:4]]
            yield format_table(gaps, "rl", max_width=60)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _ratio(now: float, before: float | None) -> str:
    return "" if before is None else f"{before:.3g} ({before / now:.2f}x)"


def last_measured(page: str) -> dict[str, float]:
    """Seconds of a step of each case, from the last table of the page."""
    _, _, rest = page.partition(HEADING)
    found = {}
    for line in rest.partition("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        name = cells[0].strip("`")
        seconds = re.match(r"([\d.]+) s$", cells[1]) if len(cells) > 1 else None
        if name in CASES and seconds is not None:
            found[name] = float(seconds[1])
    return found
