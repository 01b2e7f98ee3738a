"""Writes the table of a run as text, JSON and a picture."""

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

COLOURS = {"ours": "#2a7de1", "published": "#b0b7c3", "floor": "#3a9d5d"}


@dataclass(frozen=True)
class Row:
    """A measurement."""

    name: str
    unit: str
    ours: float
    published: float | None  # None: not measured, or the published way has nothing like it
    more_is_better: bool = False
    floor: float | None = None  # the best that this machine could do (floor.py); None: unknown

    @property
    def of_floor(self) -> float | None:
        """Our time over the floor's (or the floor's rate over ours); 1 is the best."""
        if self.floor is None:
            return None
        return self.floor / self.ours if self.more_is_better else self.ours / self.floor

    @property
    def gain(self) -> float | None:
        """How many times better ours is than the published way."""
        if self.published is None:
            return None
        return self.ours / self.published if self.more_is_better else self.published / self.ours


def describe(
    model: MossVideoForConditionalGeneration, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The facts of a run: model, settings, device and versions."""
    weight = model.model.language_model.embed_tokens.weight
    gpu = devices.name(weight.device) if devices.is_accelerator(weight) else None
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "model": arguments.checkpoint or f"{arguments.model}, random weights",
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "quantize": arguments.quantize,
        "kv_dtype": arguments.kv_dtype,
        "vision_dtype": arguments.vision_dtype,
        "compile": arguments.compile,
        "frames": arguments.endless or arguments.frames,
        "new_tokens": arguments.new_tokens,
        "device": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "clock": arguments.clock,
        "load": load,
        "torch": torch.__version__,
    }


def print_table(mode: str, rows: list[Row], facts: dict[str, Any]) -> None:
    """Prints a line for each row: ours, the floor and our ratio to it, the published way and our
    gain on it. A column without values is left out."""
    print(f"{mode}: {', '.join(f'{k} {v}' for k, v in facts.items() if v not in (None, False))}")
    columns: list[tuple[str, str, list[str]]] = [
        ("", "l", [row.name for row in rows]),
        ("ours", "r", [f"{row.ours:.4g}" for row in rows]),
        ("floor", "r", [_cell(row.floor, ".4g") for row in rows]),
        ("ours / floor", "r", [_cell(row.of_floor, ".3g", "x") for row in rows]),
        ("published", "r", [_cell(row.published, ".4g") for row in rows]),
        ("better", "r", [_cell(row.gain, ".3g", "x") for row in rows]),
        ("", "l", [row.unit for row in rows]),
    ]
    filled = [column for column in columns if any(column[2])]
    lines = zip(*([head, *cells] for head, _, cells in filled), strict=True)
    print(format_table(list(lines), "".join(align for _, align, _ in filled)))


def _cell(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def write_report(folder: Path, mode: str, rows: list[Row], facts: dict[str, Any]) -> None:
    """Writes bench-MODE.json and bench-MODE.png."""
    folder.mkdir(parents=True, exist_ok=True)
    report = {**facts, "rows": [_plain(row) for row in rows]}
    (folder / f"bench-{mode}.json").write_text(json.dumps(report, indent=1) + "\n")
    _draw(folder / f"bench-{mode}.png", mode, rows, facts)
    print(f"wrote {folder / f'bench-{mode}.json'} and .png")


def _plain(row: Row) -> dict[str, Any]:
    return asdict(row) | {"gain": row.gain, "of_floor": row.of_floor}


def _draw(path: Path, mode: str, rows: list[Row], facts: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(rows), figsize=(2.6 * len(rows), 3.4))
    for axis, row in zip(axes, rows, strict=True):
        bars = {"ours": row.ours}
        if row.published is not None:
            bars["published"] = row.published
        if row.floor is not None:
            bars["floor"] = row.floor
        axis.bar(list(bars), list(bars.values()), color=[COLOURS[name] for name in bars])
        axis.set_title(f"{row.name}, {row.unit}", fontsize=9)
        for x, value in enumerate(bars.values()):
            axis.annotate(f"{value:.3g}", (x, value), ha="center", va="bottom", fontsize=8)
        axis.margins(x=0.4, y=0.15)
    figure.suptitle(f"{mode}: {facts['model']}, {facts['dtype']}, {facts['device']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
