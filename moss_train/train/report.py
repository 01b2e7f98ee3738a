"""Writes RUN/report.html: what a run has done, as one page that needs no network.

Training writes it at its end, and when it is stopped.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from statistics import mean, median
from typing import Any

import yaml

from data_pipeline.atomic import write_atomically
from data_pipeline.commands import CommandParser, describe, finite_number, report_error
from data_pipeline.page import render
from moss_train.config import Config, ConfigError, from_dict
from moss_train.data_config import CONTROLS
from moss_train.hardware import peak_tflops_of
from moss_train.log import log
from moss_train.train.curves import Row, column, number, panel_svgs
from moss_train.train.description import RUN_FILE
from moss_train.train.goodput import PARTS, spent
from moss_train.train.history import read_history
from moss_train.train.metrics import METRICS_FILE, read_metrics
from moss_train.train.unlearned import Totals

REPORT_FILE = "report.html"
EVALUATION_FILE = "evaluation.json"


def main(arguments: list[str] | None = None) -> int:
    """The command line. 1 where RUN has no steps."""
    parser = CommandParser("python -m moss_train.train.report", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--peak-tflops",
        type=finite_number(above=0),
        metavar="N",
        help="1e12 FLOPs a second that a rank's device can compute, for MFU (default: that of the "
        "GPU that run.json names, in bf16)",
    )
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.run, options.peak_tflops))
    except ValueError as error:
        return report_error(parser.prog, error)
    except OSError as error:
        return report_error(parser.prog, describe(error))
    return 0


def write_report_or_warn(run_dir: Path, config: Config | None = None) -> None:
    """Writes the page; a failure is a warning, as no run should end because of it."""
    try:
        write_report(run_dir, config=config)
    except Exception as error:  # whatever libraries and damaged files raise
        log.warning("%s was not written: %s", run_dir / REPORT_FILE, error)


def write_report(
    run_dir: Path, peak_tflops: float | None = None, config: Config | None = None
) -> Path:
    """Writes `run_dir`/report.html from metrics.jsonl, config.yaml, run.json and, where they are
    there, evaluation.json.

    Args:
        peak_tflops: what a rank's device can compute at most, 1e12 FLOPs a second.
        config: the run's, where it is at hand; None: what config.yaml has is read.

    Raises:
        ValueError: there is no step to show.
    """
    rows = read_metrics(run_dir)
    if not rows:
        raise ValueError(f"{run_dir / METRICS_FILE}: has no steps: give a run folder")
    described = _read(run_dir / RUN_FILE)
    raw = run_dir / "config.yaml"
    config = config or _config(raw)
    if peak_tflops is None and config is not None and config.model.dtype == "bf16":
        peak_tflops = peak_tflops_of(str(described.get("device_name", "")))
    evaluated = _read(run_dir / EVALUATION_FILE)
    page = render(
        "report.html.jinja",
        Path(__file__).parent,
        title=run_dir.resolve().name,
        what=list(_what(rows, config, described)),
        warnings=list(_warnings(rows, config)),
        progress=_progress(rows),
        panels=panel_svgs(rows),
        speed=list(_speed(rows, peak_tflops)),
        goodput=_goodput(spent(read_history(run_dir), rows)),
        sources=_sources(rows[-1], config),
        unlearned=list(_unlearned(rows)),
        mixture=[f"{m} {v:g} %" for m, v in _mixture(config).items()],
        validation=_validation(rows),
        scores=score_rows(evaluated),
        score_head=score_head(evaluated),
        evaluated_step=evaluated.get("step"),
        samples=sample_rows(evaluated),
        again=f"python -m moss_train.train.report {run_dir}",
        config=raw.read_text() if raw.is_file() else "",
    )
    write_atomically(run_dir / REPORT_FILE, page)
    return run_dir / REPORT_FILE


def score_head(evaluated: Mapping[str, Any]) -> list[str]:
    """Names of the columns of `score_rows`."""
    columns = (name.replace("_", " ") for name in score_columns(evaluated))
    return ["source", "score", "model", *columns, "chance", "of"]


def score_columns(evaluated: Mapping[str, Any]) -> list[str]:
    """The controls that an evaluation.json has beside the scores."""
    scores = evaluated.get("scores", [])
    return [name for name in CONTROLS if any(s.get(name) is not None for s in scores)]


def score_rows(evaluated: Mapping[str, Any]) -> list[list[str]]:
    """Lines of the table of scores of an evaluation.json: source, metric, model, controls, chance,
    number of samples."""
    columns = ("value", *score_columns(evaluated), "chance")
    return [
        [s["source"], s["metric"], *(_show(s.get(c), ".3f", "") for c in columns), str(s["count"])]
        for s in evaluated.get("scores", [])
    ]


def sample_rows(evaluated: Mapping[str, Any], most: int = 8) -> list[list[str]]:
    """Lines of the table of samples, the first `most` of each source: which, what is asked, the
    right answer, the model's."""
    found: dict[str, list[list[str]]] = {}
    for sample in evaluated.get("samples", []):
        row = [str(sample[key]) for key in ("key", "asked", "wanted", "said")]
        found.setdefault(sample["key"].rpartition("/")[0], []).append(row)
    return [row for rows in found.values() for row in rows[:most]]


def _what(
    rows: Sequence[Row], config: Config | None, described: Mapping[str, Any]
) -> Iterator[str]:
    """What ran, where, and how far."""
    steps = f"steps {rows[0]['step']} to {rows[-1]['step']}"
    if config is not None:
        yield f"stage {config.stage.name}"
        yield f"model {config.model.name} ({config.model.dtype})"
        steps += f" of {config.steps}, {config.data.global_batch} samples each"
    yield steps
    seconds = [s for s in column(rows, "step_time_s") if math.isfinite(s)]
    yield str(timedelta(seconds=round(sum(seconds))))
    layout = described.get("layout", {})
    if layout:
        parts = " x ".join(f"{layout[k]} {k}" for k in ("data", "pipeline", "tensor"))
        yield f"{layout['world']} ranks = {parts}"
    if described:
        yield str(described.get("device_name") or described.get("device"))
        trained, total = (
            sum(described.get("parameters", {}).get(key, {}).values())
            for key in ("trained", "total")
        )
        yield f"trains {trained:,} of {total:,} parameters"
    commit = described.get("git") or {}
    if commit:
        yield f"commit {commit['commit'][:12]}{' and changes' if commit['changed'] else ''}"


def _warnings(rows: Sequence[Row], config: Config | None) -> Iterator[str]:
    last = rows[-1]
    if config is not None and last["step"] < config.steps:
        yield f"Stopped after step {last['step']} of {config.steps}: start again to go on."
    if last.get("skipped_steps"):
        yield f"{last['skipped_steps']} steps were left out (bad_steps.jsonl)."
    for line in Totals.of(rows).warnings().values():
        yield f"{line}."
    losses = column(rows, "loss")
    strange = sum(not math.isfinite(loss) for loss in losses)
    if strange:
        yield f"The loss of {strange} of {len(losses)} steps is not finite."


def _progress(rows: Sequence[Row]) -> list[list[str]]:
    """First and last value, and the mean of the last tenth of the steps."""
    tenth = max(1, len(rows) // 10)
    found = []
    for name, key, form in (
        ("loss per label", "loss", ".4f"),
        ("gradient norm", "grad_norm", ".3g"),
        ("learning rate", "lr", ".2e"),
    ):
        values = column(rows, key)
        late = [value for value in values[-tenth:] if math.isfinite(value)]
        numbers = (values[0], values[-1], mean(late) if late else math.nan)
        found.append([name, *(_show(value, form) for value in numbers)])
    return found


def _speed(rows: Sequence[Row], peak_tflops: float | None) -> Iterator[list[str]]:
    """Medians over the steps but the first, which compiles and fills caches."""
    later = rows[1:] or rows

    def of(key: str) -> float:
        values = [value for value in column(later, key) if math.isfinite(value)]
        return median(values) if values else math.nan

    flops = of("model_tflops_per_s_per_rank")
    yield ["step", _show(of("step_time_s"), ".3f"), "s"]
    yield ["waiting for data", _show(of("data_wait_s"), ".3f"), "s of a step"]
    for unit in ("samples", "tokens", "frames"):
        yield [unit, _show(of(f"{unit}_per_s"), ",.1f"), f"{unit}/s, all ranks"]
    yield ["model FLOPs", _show(flops, ".3g"), "TFLOP/s per rank"]
    if peak_tflops:
        yield ["MFU", _show(100 * flops / peak_tflops, ".1f"), f"% of {peak_tflops:g} TFLOP/s"]
    yield ["padding", _show(100 * of("padding_ratio"), ".1f"), "% of the decoder's tokens"]
    memory = [value for value in column(rows, "memory_gb") if math.isfinite(value)]
    yield ["peak memory", _show(max(memory, default=math.nan), ".2f"), "GB, rank that used most"]


def _sources(last: Row, config: Config | None) -> list[list[str]]:
    """Sources of the data: modality, share of the modality's samples, epochs read."""
    epochs = last.get("epochs") or {}
    if config is None:
        return [[name, "", "", _show(number(read), ".2f")] for name, read in epochs.items()]
    weights: dict[str, float] = {}
    for source in config.data.sources:
        weights[source.modality] = weights.get(source.modality, 0) + source.weight
    return [
        [
            source.name,
            source.modality,
            f"{100 * source.weight / (weights[source.modality] or 1):.0f} %",
            _show(number(epochs.get(source.name)), ".2f"),
        ]
        for source in config.data.sources
    ]


def _goodput(seconds: Mapping[str, float]) -> list[list[str]]:
    """What the run's wall time went into: which part, seconds, the share."""
    wall = sum(seconds.values())
    return [[PARTS[name], f"{s:,.1f}", f"{s / wall:.1%}"] for name, s in seconds.items() if s]


def _mixture(config: Config | None) -> dict[str, float]:
    """Percent of the samples of each modality."""
    shares = asdict(config.stage.mixture) if config is not None else {}
    whole = sum(shares.values()) or 1
    return {modality: round(100 * share / whole, 1) for modality, share in shares.items()}


def _unlearned(rows: Sequence[Row]) -> Iterator[list[str]]:
    """What of the data was not learned: how many, of how many, the share."""
    for name, (part, whole) in Totals.of(rows).shares().items():
        share = _show(100 * part / whole if whole else math.nan, ".2f")
        yield [name, f"{part:,}", f"{whole:,}", share]


def _validation(rows: Sequence[Row]) -> dict[str, Any] | None:
    """The last validation: losses and accuracies of all, of each modality and source."""
    measured = [row for row in rows if row.get("validation")]
    if not measured:
        return None
    found = measured[-1]["validation"]
    accuracy = found.get("accuracy", {})
    lines = [["all", found.get("loss"), accuracy.get("all")]]
    for kind in ("modality", "source"):
        for name, loss in found.get(kind, {}).items():
            lines.append([name, loss, accuracy.get(kind, {}).get(name)])
    cells = [[name, _show(loss, ".4f"), _show(share, ".3f")] for name, loss, share in lines]
    return {"step": measured[-1]["step"], "rows": cells}


def _show(value: float | None, form: str, without: str = "-") -> str:
    return without if value is None or not math.isfinite(value) else format(value, form)


def _config(path: Path) -> Config | None:
    if not path.is_file():
        return None
    try:
        return from_dict(yaml.safe_load(path.read_text()))
    except (OSError, ValueError, yaml.YAMLError, ConfigError) as error:
        log.warning("%s cannot be used: %s", path, error)
        return None


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


if __name__ == "__main__":
    sys.exit(main())
