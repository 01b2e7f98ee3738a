"""The helper that starts multi-process tests."""

from __future__ import annotations

import pytest

from tests.moss_train.train.runs import is_running
from tests.torchrun import RanksFailedError, run_ranks, start_ranks
from tests.waiting import until

WORKER = "tests/workers/misbehave.py"
BOTH = pytest.mark.parametrize("preloaded", [True, False])


@BOTH
@pytest.mark.parametrize("how", ["well", "exit"])
def test_results_of_all_ranks_come_back(tmp_path, preloaded, how):
    result = run_ranks(WORKER, 2, how, out=tmp_path, preloaded=preloaded)
    assert result.load_all("rank") == [0, 1]
    assert result.load("tensor", rank=1).tolist() == [1.0, 1.0]
    assert result.stdout(1) == "rank 1 says hello\n"


@BOTH
def test_failing_rank_ends_the_run_and_its_traceback_comes_first(tmp_path, preloaded):
    module = "tests.workers.misbehave"
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(module, 2, "raise", out=tmp_path, preloaded=preloaded)
    first = str(caught.value).partition("--- rank 0")[0]
    assert "--- rank 1 failed first" in first
    assert "ValueError: rank one had a bad day" in first


@BOTH
def test_hanging_ranks_are_killed(tmp_path, preloaded):
    run = start_ranks(WORKER, 2, "hang", out=tmp_path, preloaded=preloaded)
    until(lambda: len(list(tmp_path.glob("tensor.rank*"))) == 2)
    workers = run.rank_pids()
    assert len(workers) == 2
    with pytest.raises(RanksFailedError, match="longer than 1 s"):
        run.wait(timeout=1)
    until(lambda: not any(is_running(pid) for pid in workers))
