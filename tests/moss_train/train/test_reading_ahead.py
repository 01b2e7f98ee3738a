"""The next step is read while one is computed, and nobody notices but the clock."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import torch

from data_pipeline.batch import MicroBatch
from moss_train.compose import load_config
from moss_train.model.loss import LossOptions
from tests.waiting import until
from tests.workers.matrix import microbatches

STEPS = 5


@pytest.fixture
def reader(small, groups, tmp_path) -> Iterator[Any]:
    """Reads four samples a step, in two parts."""
    from moss_train.train.data import StepReader

    overrides = [*small, f"trainer.steps={STEPS}", "data.workers=0", f"run.dir={tmp_path}"]
    made = StepReader(load_config(overrides=overrides), groups, 1, LossOptions(-1), None)
    assert made.reads == 2
    yield made
    made.close()


def threads() -> int:
    return sum(thread.name == "next step" for thread in threading.enumerate())


def test_a_step_that_was_read_while_one_was_computed_is_not_waited_for(reader):
    """The source stands still whenever all that may be read ahead has been read."""
    given, may = count(), threading.Semaphore(reader.reads)

    def stubborn() -> Iterator[MicroBatch]:
        for batch in microbatches("text", 0, 2, 2):
            assert may.acquire(timeout=240), "the source was asked for more"
            next(given)
            yield batch

    reader.batches = stubborn()
    for step in range(1, STEPS + 1):
        reader.read(step)
        if step < STEPS:  # while it is computed
            for _ in range(reader.reads):
                may.release()
            reader.settle()
    assert next(given) == STEPS * reader.reads
    assert threads() == 0  # nothing is read behind the last step


def test_what_is_read_ahead_is_planned_and_in_order(reader):
    from moss_train.train.step_plan import StepPlan

    reader.batches = microbatches("mixed", 0, 2, 2)
    direct = microbatches("mixed", 0, 2, 2)
    for step in range(1, STEPS + 1):
        batch, plan = reader.read(step)
        expected = [next(direct), next(direct)]
        assert batch.keys == [key for part in expected for key in part.keys]
        frames = torch.cat([part.frames for part in expected])
        assert batch.frames.sum() == frames.sum()
        anew = StepPlan(batch.microbatches, reader.config, reader.loss)
        assert torch.equal(plan.counts, anew.counts)
        for ours, theirs in zip(plan.inputs, anew.inputs, strict=True):
            assert torch.equal(ours.text.tokens, theirs.text.tokens)
            assert torch.equal(ours.targets.positions, theirs.targets.positions)
            assert torch.equal(ours.frames.last, theirs.frames.last)


def test_an_error_comes_with_its_own_words_when_its_step_is_asked_for(reader):
    def failing() -> Iterator[MicroBatch]:
        good = microbatches("text", 0, 2, 2)
        yield from (next(good) for _ in range(3))
        raise OSError("shard 7: no such device")

    reader.batches = failing()
    reader.read(1)
    reader.settle()
    with pytest.raises(OSError, match="shard 7: no such device"):
        reader.read(2)


def test_the_state_is_that_after_the_last_step_given(reader):
    """With the real loader, which has read one step more."""
    states, keys = [], []
    for step in range(1, 4):
        keys.append(reader.read(step)[0].keys)
        reader.settle()
        states.append(reader.state())
    again = type(reader)(reader.config, reader.groups, 1, reader.loss, states[1])
    assert again.read(3)[0].keys == keys[2] != keys[1]
    again.close()


def test_a_stop_waits_for_no_more_than_what_is_being_read(reader):
    numbers = count()

    def counted() -> Iterator[MicroBatch]:
        for batch in microbatches("text", 0, 2, 2):
            if next(numbers) == reader.reads:  # the next step's first one comes after the stop
                until(lambda: reader._stopping)
            yield batch

    reader.batches = counted()
    reader.read(1)
    reader.stop()
    assert threads() == 0
    assert next(numbers) == 3  # of the second step only the first part
