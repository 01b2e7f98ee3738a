"""The table of a run, as text, JSON and a picture."""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline import devices
from data_pipeline.tables import format_table
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration


@dataclass(frozen=True)
class Row:
    """One measured thing; `published` is None where the published way has nothing like it."""

    name: str
    unit: str
    ours: float
    published: float | None
    more_is_better: bool = False

    @property
    def gain(self) -> float | None:
        """How many times better ours is."""
        if self.published is None:
            return None
        return self.ours / self.published if self.more_is_better else self.published / self.ours


def describe(
    model: MossVideoForConditionalGeneration, arguments: argparse.Namespace
) -> dict[str, Any]:
    """What was measured, on what."""
    weight = model.model.language_model.embed_tokens.weight
    gpu = devices.name(weight.device) if devices.is_accelerator(weight) else None
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "model": arguments.checkpoint or f"{arguments.model}, random weights",
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "quantize": arguments.quantize,
        "compile": arguments.compile,
        "frames": arguments.endless or arguments.frames,
        "new_tokens": arguments.new_tokens,
        "device": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "clock": arguments.clock,
        "load": load,
        "torch": torch.__version__,
    }


def print_table(mode: str, rows: list[Row], facts: dict[str, Any]) -> None:
    """Columns: what, ours, the published way, how many times better."""
    print(f"{mode}: {', '.join(f'{k} {v}' for k, v in facts.items() if v not in (None, False))}")
    cells = [("", "ours", "published", "better", "")]
    for row in rows:
        theirs = "" if row.published is None else f"{row.published:.4g}"
        gain = "" if row.gain is None else f"{row.gain:.3g}x"
        cells.append((row.name, f"{row.ours:.4g}", theirs, gain, row.unit))
    print(format_table(cells, "lrrrl"))


def write_report(folder: Path, mode: str, rows: list[Row], facts: dict[str, Any]) -> None:
    """bench-MODE.json and bench-MODE.png."""
    folder.mkdir(parents=True, exist_ok=True)
    report = {**facts, "rows": [asdict(row) | {"gain": row.gain} for row in rows]}
    (folder / f"bench-{mode}.json").write_text(json.dumps(report, indent=1) + "\n")
    _draw(folder / f"bench-{mode}.png", mode, rows, facts)
    print(f"wrote {folder / f'bench-{mode}.json'} and .png")


def _draw(path: Path, mode: str, rows: list[Row], facts: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(rows), figsize=(2.6 * len(rows), 3.4))
    for axis, row in zip(axes, rows, strict=True):
        bars = {"ours": row.ours}
        if row.published is not None:
            bars["published"] = row.published
        axis.bar(list(bars), list(bars.values()), color=["#2a7de1", "#b0b7c3"][: len(bars)])
        axis.set_title(f"{row.name}, {row.unit}", fontsize=9)
        for x, value in enumerate(bars.values()):
            axis.annotate(f"{value:.3g}", (x, value), ha="center", va="bottom", fontsize=8)
        axis.margins(x=0.4, y=0.15)
    figure.suptitle(f"{mode}: {facts['model']}, {facts['dtype']}, {facts['device']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
