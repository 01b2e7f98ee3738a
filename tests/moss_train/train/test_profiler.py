"""Which steps are profiled; the profile of a job is in test_job.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from moss_train.compose import load_config
from moss_train.config import Config, TrainerConfig
from moss_train.train.profiler import StepProfiler
from moss_train.validate import _numbers


@pytest.mark.parametrize(
    ("text", "steps"),
    [("10..12", (10, 12)), ("steps=10..12", (10, 12)), ("7", (7, 7)), (None, None)],
)
def test_a_range_of_steps(text, steps):
    assert TrainerConfig(profile=text).profiled_steps == steps


def test_no_quotes_are_needed_on_a_command_line():
    overrides = ["trainer.profile=steps=10..12"]
    assert load_config("pt1", overrides=overrides).trainer.profiled_steps == (10, 12)


@pytest.mark.parametrize("text", ["12..10", "0..3", "ten", "1..", "1-3"])
def test_what_is_no_range_is_refused_before_a_run(text):
    config = Config(trainer=TrainerConfig(profile=text, steps=5))
    refused = f"trainer.profile={text}: give the first and the last step, like 10..12"
    assert refused in list(_numbers(config))


def test_a_run_that_resumes_within_the_range_profiles_the_rest(tmp_path: Path, groups):
    profiler = StepProfiler((2, 4), tmp_path / "profile")
    for number in (3, 4, 5):
        with profiler.step(number):
            pass
        assert (tmp_path / "profile").exists() == (number >= 4)
    assert "Steps 3 to 4" in (tmp_path / "profile" / "profile.html").read_text()
