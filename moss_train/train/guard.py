"""Finds steps that would harm the weights, leaves them out and writes them down."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from moss_train.train import json_lines
from moss_train.train.metrics import read_metrics

WINDOW = 100  # accepted losses whose median a spike is measured against
MOST_RETURNS = 3  # to one checkpoint, each time on with other data
ENOUGH = 10  # accepted losses without which no median is taken
BAD_STEPS_FILE = "bad_steps.jsonl"

REASONS = (
    None,
    "the loss is a spike",
    "the gradient is not finite",
    "the loss is not finite",
)


class Guard:
    """Decides about each step. Every rank holds one; the worst of their verdicts counts.

    skipped: steps left out, of the whole run. accepted: steps done, by this process.
    in_a_row: steps left out since the last one that was done.
    """

    def __init__(self, spike_factor: float | None, recent: list[float], skipped: int):
        """Goes on from the `recent` losses of accepted steps and the count of `skipped` ones."""
        self.spike_factor = spike_factor
        self.losses = deque(recent, maxlen=WINDOW)
        self.skipped, self.accepted, self.in_a_row = skipped, 0, 0
        # Of the last return: to which checkpoint, how many in a row there were to it, and how many
        # steps had been accepted by then.
        self._returned_to: Path | None = None
        self._returns, self._accepted = 0, -1

    @staticmethod
    def resume(spike_factor: float | None, run: Path, done: int) -> Guard:
        """A guard with the history of `run` up to step `done`. A collective: rank 0 reads it."""
        read = [_history(run, done) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(read, src=0)
        assert read[0] is not None
        return Guard(spike_factor, *read[0])

    def record(self, verdict: int, loss: float) -> str | None:
        """Counts a step of that verdict; why it must be left out, None where it may be done."""
        reason = REASONS[verdict]
        if reason is None:
            self.losses.append(loss)
            self.accepted += 1
            self.in_a_row = 0
        else:
            self.skipped += 1
            self.in_a_row += 1
        return reason

    def may_help(self, checkpoint: Path) -> bool:
        """Whether returning to a checkpoint may help: not where no step was accepted since the last
        return; nor after `MOST_RETURNS` in a row to this one, when what is accepted in between
        destroys the weights each time."""
        often = checkpoint == self._returned_to and self._returns >= MOST_RETURNS
        return self.accepted != self._accepted and not often

    def returned(self, checkpoint: Path) -> None:
        """Notes that the run has gone back to a checkpoint."""
        self._returns = self._returns + 1 if checkpoint == self._returned_to else 1
        self._returned_to, self._accepted, self.in_a_row = checkpoint, self.accepted, 0

    def verdict(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """A verdict, a place in REASONS, as a number on the device that nobody has to read yet.

        It is this rank's: numbers may differ by rounding.

        Args:
            loss: of the global batch. grad_norm: of all parameters. fp64 scalars.
        """
        limit = math.inf
        if self.spike_factor is not None and len(self.losses) >= ENOUGH:
            limit = self.spike_factor * median(self.losses)
        verdict = (loss > limit).to(loss.dtype)
        verdict = torch.where(grad_norm.isfinite(), verdict, 2.0)
        return torch.where(loss.isfinite(), verdict, 3.0)


def _history(run: Path, done: int) -> tuple[list[float], int]:
    """Losses of accepted steps up to `done`, and how many steps had been skipped by then."""
    losses, skipped = [], 0
    for record in read_metrics(run):
        if record["step"] <= done:
            before, skipped = skipped, record.get("skipped_steps", 0)
            if skipped == before:
                losses.append(record["loss"])
    return losses[-WINDOW:], skipped


def write_bad_step(
    run: Path, step: int, reason: str, loss: float, grad_norm: float, keys: list[str]
) -> None:
    """Appends a step and the keys of its samples on all ranks to bad_steps.jsonl. A collective."""
    everywhere: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, keys)
    if dist.get_rank() == 0:
        record = {
            "step": step,
            "reason": reason,
            "loss": loss,
            "grad_norm": grad_norm,
            "keys": [key for part in everywhere for key in part],
        }
        json_lines.append(run / BAD_STEPS_FILE, record)
