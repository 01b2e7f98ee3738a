"""Training from Python: a job in this process, and the run that it leaves."""

from __future__ import annotations

import gc
import io
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml

from data_pipeline.commands import one_line
from moss_train.checkpoint_dir import find
from moss_train.config import Config, ConfigError, checked, from_dict
from moss_train.imports import quick_imports
from moss_train.log import configure
from moss_train.main import run as run_job
from moss_train.train.curves import loss_figure
from moss_train.train.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moss_train.evaluate.model import TrainedModel


def train(config: Config, *, quiet: bool = False) -> Run:
    """Trains in this process, as `python launch/train.py` does, and returns when it is done.

    Ctrl-C (in a notebook: Interrupt) ends the step, saves, and returns, too; the same call goes on
    from there, for a run continues in its folder, `config.run.dir`. The process can train other
    configurations afterwards; but once it has worked on the CPU, it cannot use CUDA.

    Args:
        config: of `load_config`; it is not changed.
        quiet: print warnings only; else stderr gets what the command line prints.

    Raises:
        ConfigError: the configuration is wrong; it has a line for each problem.
        RuntimeError: training failed; the message names the step and the reason.
    """
    config = checked(config)
    configure(quiet)
    with _settings_kept(), _collected():
        stopped = run_job(config, io.StringIO() if quiet else sys.stderr)
    return Run(Path(config.run.dir), stopped)


@dataclass(frozen=True)
class Run:
    """What a training run has left in its folder.

    stopped: a signal ended it before its last step.
    """

    dir: Path
    stopped: bool = False

    @classmethod
    def open(cls, folder: Path | str) -> Run:
        """A run that some process has done or is doing.

        Raises:
            ConfigError: there is none in `folder`.
        """
        run = cls(Path(folder))
        _ = run.config
        return run

    @property
    def config(self) -> Config:
        """The run's configuration (config.yaml)."""
        path = self.dir / "config.yaml"
        try:
            return from_dict(yaml.safe_load(path.read_text()))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError([f"{path}: {one_line(error)}: give the folder of a run"]) from None

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """What metrics.jsonl says of each step: `step`, `loss`, `lr`, `grad_norm`, `step_time_s`,
        `tokens_per_s`, ... (moss_train/train/metrics.py). A value that was not finite is None.
        """
        return read_metrics(self.dir)

    @property
    def checkpoint(self) -> Path | None:
        """The run's newest complete checkpoint."""
        return find(self.dir)

    def plot(self) -> Figure:
        """The loss over the steps, with validation losses where there are some.

        Raises:
            ValueError: there is no step yet.
        """
        rows = self.metrics
        if not rows:
            raise ValueError(f"{self.dir}: has no steps to plot: train for one at least")
        figure = loss_figure(rows, f"Training loss of {self.dir.resolve().name}")
        # Without pyplot nobody tells a notebook how to show a figure.
        figure._repr_png_ = lambda: _png(figure)  # type: ignore[attr-defined]
        return figure

    def model(self, device: str = "auto", threads: int | None = None) -> TrainedModel:
        """The model of the newest checkpoint: see `TrainedModel.open`."""
        with _collected(), quick_imports():
            from moss_train.evaluate.model import TrainedModel

        return TrainedModel.open(self.dir, device, threads)


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=80)
    return out.getvalue()


@contextmanager
def _settings_kept() -> Iterator[None]:
    """A job seeds and sets up its process; what the caller had is restored after it."""
    draws, numpy_draws = random.getstate(), np.random.get_state()  # noqa: NPY002
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(draws)
            np.random.set_state(numpy_draws)  # noqa: NPY002
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic)


@contextmanager
def _collected() -> Iterator[None]:
    """Imports freeze all objects that there are, since in a command no garbage is among them. Here
    there may be: the model of a job before would stay, with its memory. The caller's own objects
    become garbage later.
    """
    gc.collect()
    try:
        yield
    finally:
        gc.unfreeze()
