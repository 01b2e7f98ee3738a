"""What a step reports, and where it goes: metrics.jsonl and the console; loggers.py copies it.

Everything here runs on rank 0 only, with numbers that are already reduced over the ranks.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

from data_pipeline.progress import ConsoleLine, eta, rate
from moss_train.storage import or_warning
from moss_train.train import json_lines

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"

GROUPS = {
    "loss": ("loss", "weighted_loss", "lr", "grad_norm", "skipped_steps"),
    "data": (
        "samples", "tokens", "labels", "frames", "skipped_samples",
        "truncated_samples", "truncated_labels", "turns", "masked_turns",
        "frames_per_rank_max", "frames_per_rank_mean", "padding_ratio",
    ),
    "speed": (
        "step_time_s", "data_wait_s", "model_tflops_per_s_per_rank", "mfu", "hfu",
        "samples_per_s", "tokens_per_s", "frames_per_s", "validation_s", "save_s",
    ),
    "memory": ("memory_gb",),
}  # fmt: skip


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step over all ranks.

    step: number of the step, the first is 1.
    loss: of the global batch, per label. weighted_loss: that of loss=weighted without smoothing and
        z, as validation has it, where another one trains; None (not written): none does.
    lr: learning rate of this step's update.
    grad_norm: of all parameters, before clipping.
    samples, tokens, frames: conversations, text tokens without padding, frames of the step.
    labels: tokens that have a loss.
    turns: the assistant's. masked_turns: of these, the ones that the data mark as context.
    truncated_samples: conversations that were cut at the sequence length; truncated_labels: tokens
        that would have had a loss, behind the cuts.
    step_time_s: wall time from asking for the batch to updated weights, seconds; without
        validation and saving.
    model_tflops_per_s_per_rank: 1e12 model FLOPs a second on a rank (flops.py), mean over ranks.
    memory_gb: peak memory of the rank that used most, 1e9 bytes.
    data_wait_s: of step_time_s, the time that the slowest rank waited for its batch, seconds.
    skipped_samples: samples left out on the way to this step, as they could not be used;
        skipped_reasons: how many for each reason.
    skipped_steps: steps so far whose update was left out (guard.py), this one included.
    frames_per_rank_max, frames_per_rank_mean: frames encoded by a rank in this step; the busiest
        rank sets the pace, not the mean.
    epochs: how often each source has been read so far, in the whole run; 1.5: half of it twice.
    validation: losses and accuracies after this step on held-out sources (validation.py); suites:
        scores of `trainer.eval_suites` (held_out.py). None: not measured, and not written.
    mfu, hfu: model FLOPs a second, and with what is recomputed, as shares of what a rank's GPU can
        compute in bf16; None (not written): on a CPU, in fp32.
    phase_s: seconds of each phase on rank 0 (phases.py).
    time: when the step ended, seconds since 1970 (UTC).
    validation_s: of the validation and the suites after this step. save_s: that training waited
        for saving since the step before.
    padding_ratio: padding tokens / all tokens that the decoder computed, 0 to 1.
    samples_per_s, tokens_per_s, frames_per_s: all ranks together; made from the numbers above.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    samples: int
    tokens: int
    labels: int
    frames: int
    turns: int
    masked_turns: int
    truncated_samples: int
    truncated_labels: int
    step_time_s: float
    model_tflops_per_s_per_rank: float
    memory_gb: float
    data_wait_s: float
    skipped_samples: int
    skipped_reasons: dict[str, int]
    skipped_steps: int
    frames_per_rank_max: int
    frames_per_rank_mean: float
    padding_ratio: float
    epochs: dict[str, float]
    weighted_loss: float | None = None
    validation: dict[str, Any] | None = None
    suites: dict[str, dict[str, float]] | None = None
    mfu: float | None = None
    hfu: float | None = None
    phase_s: dict[str, float] = field(default_factory=dict)
    time: float = 0.0
    validation_s: float = 0.0
    save_s: float = 0.0
    samples_per_s: float = field(init=False)
    tokens_per_s: float = field(init=False)
    frames_per_s: float = field(init=False)

    def __post_init__(self) -> None:
        for name in ("samples", "tokens", "frames"):
            object.__setattr__(self, f"{name}_per_s", getattr(self, name) / self.step_time_s)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The steps in `run_dir`/metrics.jsonl; [] without such a file.

    A line that is not whole (a killed run wrote it) is left out, with a warning. A value that was
    not finite is None.
    """
    return json_lines.read(run_dir / METRICS_FILE, "step")


class Logger(Protocol):
    """Something that shows the steps elsewhere (loggers.py)."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds a step."""

    def rewind(self, step: int) -> None:
        """Forgets the steps after `step`, which metrics.jsonl no longer has."""


class MetricsWriter:
    """Writes each step to metrics.jsonl and to loggers."""

    def __init__(self, run_dir: Path, loggers: Sequence[Logger] = (), resume_step: int = 0):
        """Opens the file of a run that goes on after `resume_step` (0: a new run).

        Later steps that an earlier process left in metrics.jsonl are removed, so that no step is
        there twice.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        self._loggers = list(loggers)
        self._path = run_dir / METRICS_FILE
        json_lines.cut(self._path, resume_step)

    def rewind(self, step: int) -> None:
        """Removes the steps after `step`, from which the run goes on, here and from loggers."""
        json_lines.cut(self._path, step)
        self._call_loggers("rewind", step)

    def write(self, metrics: StepMetrics) -> None:
        """Appends the step's line; a value that is not finite becomes null."""
        values = asdict(metrics)
        for name in ("weighted_loss", "validation", "suites", "mfu", "hfu"):
            if values[name] is None:
                del values[name]
        json_lines.append(self._path, values)
        self._call_loggers("write", metrics.step, logged_values(values))

    def _call_loggers(self, method: str, *what: Any) -> None:
        """Calls all loggers; one that cannot write is not called again."""
        for logger in list(self._loggers):
            name = type(logger).__name__
            with or_warning(f"{name}'s files", "it gets no more steps of this job"):
                self._loggers.remove(logger)
                getattr(logger, method)(*what)
                self._loggers.append(logger)


def logged_values(row: Mapping[str, Any]) -> dict[str, float]:
    """`{group/name: value}` of a step, as loggers show it; NaN for what was not finite."""
    values = {f"{group}/{k}": row[k] for group, names in GROUPS.items() for k in names if k in row}
    values |= {f"data/epochs/{source}": epochs for source, epochs in row["epochs"].items()}
    phases = row.get("phase_s") or {}
    values |= {f"speed/phase_s/{phase}": seconds for phase, seconds in phases.items()}
    skipped = row.get("skipped_reasons") or {}
    values |= {f"data/skipped/{reason}": count for reason, count in skipped.items()}
    finite = {name: math.nan if value is None else value for name, value in values.items()}
    measured = {
        key: value
        for name in ("validation", "suites")
        for key, value in _flat(name, row.get(name) or {}).items()
    }
    return finite | {k: v for k, v in measured.items() if v is not None}


class StepLine:
    """The console's line of a run: rewritten in place on a terminal, else one line a step."""

    RECENT = 20  # steps that the ETA's average looks back

    def __init__(self, total: int, every: int = 1, stream: TextIO | None = None):
        """`total`: last step; `every`: steps between plain lines (`trainer.console_every`)."""
        self.total, self.every = total, every
        self._line, self._warm = ConsoleLine(stream or sys.stdout), False
        self._times: deque[float] = deque(maxlen=self.RECENT)

    def update(self, metrics: StepMetrics) -> None:
        """Shows a step. Off a terminal every `every`-th, and the last."""
        if self._warm:
            self._times.append(metrics.step_time_s)
        self._warm = True  # the first step of a process compiles and fills caches: no measure
        width = shutil.get_terminal_size().columns - 1 if self._line.live else None
        text = progress_line(metrics, self.total, self.eta_s(metrics.step), width)
        prints = metrics.step % self.every == 0 or metrics.step == self.total
        with _patient():
            self._line.update(text, prints)

    def eta_s(self, step: int) -> float | None:
        """Seconds that the steps after `step` will take; None before there is a measure."""
        times = self._times
        return (self.total - step) * sum(times) / len(times) if times else None

    def note(self, text: str) -> None:
        """Prints a line of its own above the progress line."""
        self._line.note(text)

    def close(self) -> None:
        """Ends the progress line."""
        with _patient():
            self._line.close()


@contextmanager
def _patient() -> Iterator[None]:
    """Ignores a console that cannot be written: where it is a file on a full disk, Python keeps the
    text until it can be."""
    try:
        yield
    except BrokenPipeError:  # nobody reads it any more
        raise
    except OSError:
        pass


def progress_line(
    metrics: StepMetrics, total: int, eta_s: float | None, width: int | None = None
) -> str:
    """The console's line for a step; one that is wider than `width` drops what matters least."""
    parts = {
        "step": f"step {metrics.step}/{total}",
        "loss": f"loss {metrics.loss:.4f}",
        "lr": f"lr {metrics.lr:.1e}",
        "grad_norm": f"grad norm {metrics.grad_norm:.3g}",
        "samples": f"{rate(metrics.samples_per_s)} samples/s",
        "frames": f"{rate(metrics.frames_per_s)} frames/s",
        "tokens": f"{rate(metrics.tokens_per_s)} tokens/s",
        **_device_parts(metrics),
        "eta": eta(eta_s),
    }
    parts = {name: part for name, part in parts.items() if part}
    line = "  ".join(parts.values())
    least_first = (
        "phases", "grad_norm", "samples", "hfu", "lr", "memory", "tokens", "mfu", "frames", "eta",
    )  # fmt: skip
    for least in least_first:
        if width is None or len(line) <= width:
            break
        parts.pop(least, None)
        line = " ".join(parts.values()).removeprefix("step ")
    return line


def _device_parts(metrics: StepMetrics) -> dict[str, str]:
    """What a step made of a GPU; nothing where that is not known."""
    if metrics.mfu is None:
        return {}
    shares = {"data": metrics.data_wait_s, **metrics.phase_s}
    worth = {name: seconds / metrics.step_time_s for name, seconds in shares.items()}
    phases = ", ".join(f"{name} {share:.0%}" for name, share in worth.items() if share >= 0.005)
    return {
        "mfu": f"MFU {metrics.mfu:.0%}",
        "hfu": "" if metrics.hfu is None else f"HFU {metrics.hfu:.0%}",
        "memory": f"{metrics.memory_gb:.0f} GB",
        "phases": phases,
    }


def _flat(name: str, value: Any) -> dict[str, Any]:
    """`{name/key/...: number}` of nested dictionaries."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, own in value.items() for k, v in _flat(f"{name}/{key}", own).items()}
