"""What a step reports, and where it goes: metrics.jsonl, wandb, TensorBoard, the console.

Everything here runs on rank 0 only, with numbers that are already reduced over the ranks.
"""

from __future__ import annotations

import json
import math
import secrets
import shutil
import sys
from collections import deque
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from data_pipeline.atomic import write_atomically
from data_pipeline.progress import ConsoleLine, eta, rate
from moss_train.config import LoggerConfig
from moss_train.log import log

METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb_id"
TENSORBOARD_DIR = "tensorboard"

GROUPS = {
    "loss": ("loss", "lr", "grad_norm", "skipped_steps"),
    "data": (
        "samples", "tokens", "frames", "skipped_samples",
        "frames_per_rank_max", "frames_per_rank_mean", "padding_ratio",
    ),
    "speed": (
        "step_time_s", "data_wait_s", "model_tflops_per_s_per_rank",
        "samples_per_s", "tokens_per_s", "frames_per_s",
    ),
    "memory": ("memory_gb",),
}  # fmt: skip


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step over all ranks.

    step: number of the step, the first is 1.
    loss: of the global batch, per label.
    lr: learning rate of this step's update.
    grad_norm: of all parameters, before clipping.
    samples, tokens, frames: conversations, text tokens without padding, frames of the step.
    step_time_s: wall time from asking for the batch to updated weights, seconds; without
        validation and saving.
    model_tflops_per_s_per_rank: 1e12 model FLOPs a second on a rank (flops.py), mean over ranks.
    memory_gb: peak memory of the rank that used most, 1e9 bytes.
    data_wait_s: of step_time_s, the time that the slowest rank waited for its batch, seconds.
    skipped_samples: samples left out on the way to this step, as they could not be read.
    skipped_steps: steps so far whose update was left out (guard.py), this one included.
    frames_per_rank_max, frames_per_rank_mean: frames encoded by a rank in this step; the busiest
        rank sets the pace, not the mean.
    epochs: how often each source has been read so far, in the whole run; 1.5: half of it twice.
    validation: losses and accuracies after this step on held-out sources (validation.py); None:
        not measured, and not written.
    padding_ratio: padding tokens / all tokens that the decoder computed, 0 to 1.
    samples_per_s, tokens_per_s, frames_per_s: all ranks together; made from the numbers above.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    samples: int
    tokens: int
    frames: int
    step_time_s: float
    model_tflops_per_s_per_rank: float
    memory_gb: float
    data_wait_s: float
    skipped_samples: int
    skipped_steps: int
    frames_per_rank_max: int
    frames_per_rank_mean: float
    padding_ratio: float
    epochs: dict[str, float]
    validation: dict[str, Any] | None = None
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
    return [record for _, record in _whole_lines(run_dir / METRICS_FILE)]


class MetricsWriter:
    """Writes each step to metrics.jsonl, wandb and TensorBoard. A context manager."""

    def __init__(
        self, run_dir: Path, logger: LoggerConfig, config: dict[str, Any], resume_step: int = 0
    ):
        """Opens the files of a run that goes on after `resume_step` (0: a new run).

        Later steps that an earlier process left in metrics.jsonl are removed, so that no step is
        there twice. TensorBoard hides them. wandb keeps one run (its id is in `run_dir`/wandb_id)
        and shows repeated steps twice.

        Args:
            config: the run's configuration as plain containers, shown by wandb.

        Raises:
            ValueError: a chosen logger is not installed, or its mode is unknown.
            RuntimeError: wandb cannot start.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        self._sinks: list[_Wandb | _TensorBoard] = []
        if logger.wandb:
            self._sinks.append(_Wandb(run_dir, logger, config))
        if logger.tensorboard:
            self._sinks.append(_TensorBoard(run_dir, resume_step))
        self._path = run_dir / METRICS_FILE
        _truncate(self._path, resume_step)
        self._file = self._path.open("a", encoding="utf-8")

    def rewind(self, step: int) -> None:
        """Removes the steps after `step`, from which the run goes on, from metrics.jsonl."""
        self._file.close()
        _truncate(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, metrics: StepMetrics) -> None:
        """Appends the step's line and flushes it; a value that is not finite becomes null."""
        values = asdict(metrics)
        measured = values["validation"]
        if measured is None:
            del values["validation"]
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()
        grouped = {f"{group}/{k}": values[k] for group, names in GROUPS.items() for k in names}
        grouped |= {f"data/epochs/{source}": epochs for source, epochs in metrics.epochs.items()}
        if measured is not None:
            grouped |= {k: v for k, v in _flat("validation", measured).items() if v is not None}
        for sink in self._sinks:
            sink.write(metrics.step, grouped)

    def close(self, failed: bool = False) -> None:
        """Closes the file, and hands over what the loggers still hold; `failed` marks the run."""
        self._file.close()
        while self._sinks:
            self._sinks.pop().close(failed)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)


class _Wandb:
    def __init__(self, run_dir: Path, logger: LoggerConfig, config: dict[str, Any]):
        online = logger.wandb_mode == "online"
        if not online and logger.wandb_mode != "offline":
            raise ValueError(f"logger.wandb_mode={logger.wandb_mode}: online or offline")
        _require("wandb", "logger.wandb=true")
        import wandb

        id_file = run_dir / WANDB_ID_FILE
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4) + "\n")
        try:
            self._run = wandb.init(
                project=logger.project,
                name=run_dir.resolve().name,
                id=id_file.read_text().strip(),
                resume="allow" if online else None,  # offline there is nothing to resume from
                mode="online" if online else "offline",
                dir=str(run_dir),
                config=config,
                settings=wandb.Settings(console="off", silent=not online),
            )
        except wandb.Error as error:
            hint = "(logger.wandb_mode=offline needs neither network nor account)"
            raise RuntimeError(f"logger.wandb=true: wandb cannot start {hint}: {error}") from error
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _TensorBoard:
    def __init__(self, run_dir: Path, resume_step: int):
        _require("tensorboard", "logger.tensorboard=true")
        from torch.utils.tensorboard import SummaryWriter

        folder = str(run_dir / TENSORBOARD_DIR)
        self._writer = SummaryWriter(folder, purge_step=resume_step + 1, flush_secs=10)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


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
        due = metrics.step % self.every == 0 or metrics.step == self.total
        self._line.update(text, due)

    def eta_s(self, step: int) -> float | None:
        """Seconds that the steps after `step` will take; None before there is a measure."""
        times = self._times
        return (self.total - step) * sum(times) / len(times) if times else None

    def note(self, text: str) -> None:
        """Prints a line of its own above the progress line."""
        self._line.note(text)

    def close(self) -> None:
        """Ends the progress line."""
        self._line.close()


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
        "eta": eta(eta_s),
    }
    line = "  ".join(parts.values())
    for least in ("grad_norm", "samples", "lr", "tokens", "frames", "eta"):
        if width is None or len(line) <= width:
            break
        del parts[least]
        line = " ".join(parts.values()).removeprefix("step ")
    return line


def _flat(name: str, value: Any) -> dict[str, Any]:
    """`{name/key/...: number}` of nested dictionaries."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, own in value.items() for k, v in _flat(f"{name}/{key}", own).items()}


def _require(package: str, option: str) -> None:
    if find_spec(package) is None:
        raise ValueError(f"{option} needs the package {package}: pip install {package}")


def _whole_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = [(line, record) for line in lines if (record := _parse(line)) is not None]
    if len(records) < len(lines):
        log.warning("%s: %d line(s) not whole, left out", path, len(lines) - len(records))
    return records


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _truncate(path: Path, last: int) -> None:
    """Keeps the whole lines up to step `last`; the file is replaced at once, or not at all."""
    kept = b"".join(line + b"\n" for line, record in _whole_lines(path) if record["step"] <= last)
    if not path.exists() or kept == path.read_bytes():
        return
    write_atomically(path, kept)
