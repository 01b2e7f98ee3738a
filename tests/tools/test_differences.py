"""How far apart two sides are: a loss that is no number agrees with none."""

from __future__ import annotations

import argparse
import math
from types import SimpleNamespace
from typing import Any

import torch

from tools.bench import train
from tools.differences import largest, relative


def test_a_nan_is_the_largest_wherever_it_is():
    assert largest([]) == 0
    assert largest([0.5, 2.0, 1.0]) == 2.0
    for numbers in ([math.nan, 1.0], [0.0, math.nan, 1.0], [0.0, math.nan]):
        assert math.isnan(largest(numbers))
    assert relative([2.2, 0.9], [2.0, 1.0]) == abs(2.2 - 2.0) / 2.0
    assert math.isnan(relative([2.0, math.nan], [2.0, 1.0]))


def test_a_benchmark_whose_side_has_a_nan_does_not_call_that_agreement():
    def team(name: str, losses: list[float]) -> Any:
        turn = {"seconds": 1.0, "peak_gb": 2.0, "start_gb": 1.0}
        return SimpleNamespace(name=name, ranks=1, losses=losses, turns=[turn], padded=10.0)

    args = argparse.Namespace(rounds=1, steps=1, warmup=3)
    teams = [team("HF", [3.0, 2.0, 1.0]), team("single", [3.0, math.nan, 1.0])]
    batch: Any = SimpleNamespace(lengths=torch.tensor([8]), frame_rows=[0])
    rows = train.summarize(teams, [batch], args, 1, 8)
    said = train.table({"stage": "pt1", "loader_samples_per_s": 1.0, "rows": rows})
    assert "losses of the warm-up steps DIFFER" in said
    assert train.failed([{"rows": rows}])
    rows = train.summarize(teams[:1], [batch], args, 1, 8)
    assert not train.failed([{"rows": rows}])
