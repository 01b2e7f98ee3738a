"""Five faults, and the same losses as in peace. `make chaos` has a hundred, of all kinds."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from tools.chaos.__main__ import main
from tools.chaos.faults import SIGNALS, all_faults
from tools.chaos.run import Chaos, Verdict, chosen
from tools.chaos.training import HANG_S

KINDS = [
    "SIGKILL, the launcher", "SIGSTOP, one rank", "SIGTERM, a loader worker", "truncated shard",
    "full disk",
]  # fmt: skip


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> tuple[int, Path]:
    """The exit code of five faults, and their folder."""
    out = tmp_path_factory.mktemp("chaos") / "out"
    return main(["--faults", "5", "--seed", "3", "--out", str(out), "--kinds", *KINDS]), out


def test_nothing_is_lost_and_nothing_is_left(faults):
    code, out = faults
    verdict = json.loads((out / "chaos.json").read_text())
    assert verdict["wrong"] == []
    assert code == 0
    assert len(verdict["outcomes"]) == 5
    table = (out / "chaos.md").read_text()
    assert all(f"| {fault['name']} | " in table for fault in verdict["outcomes"])


def test_the_rank_that_hung_is_named_with_its_stacks(faults):
    _, out = faults
    (stopped,) = (
        path
        for path in (out / "run" / "hangs").glob("*/rank_*.txt")
        if "stopped by a signal" in path.read_text()
    )
    late = int(stopped.stem.removeprefix("rank_"))
    waiting = stopped.with_name(f"rank_{(late + 1) % 4:05d}.txt").read_text()
    assert "most recent call first" in waiting
    assert "loop.py" in waiting
    said = "".join(path.read_text() for path in out.glob("run_*.log"))
    named = rf"the job hangs \(hardware.hang_s={HANG_S}\): furthest behind: rank {late} on "
    assert re.search(named, said)


def test_kinds_that_there_are_not_are_refused_and_none_is_a_plan_without_end(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--kinds", "SIGKILL, one rank", "full moon", "--out", str(tmp_path / "out")])
    assert end.value.code == 2
    assert "--kinds full moon: is none of: SIGKILL, one rank; " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert chosen([], 3, random.Random(7)) == []


def test_a_loss_that_is_no_number_is_not_like_that_of_the_run_in_peace(tmp_path):
    chaos = Chaos(tmp_path, [], 1, 1, print, print, lambda: False)
    chaos.verdict = Verdict(1, 1, steps=3)
    for run, losses in (("run", [3.0, None, 2.0]), ("quiet", [3.0, 2.5, 2.0])):
        (tmp_path / run).mkdir()
        rows = [{"step": n, "loss": loss} for n, loss in enumerate(losses, 1)]
        (tmp_path / run / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows))
    chaos._compare(tmp_path / "quiet")
    assert chaos.verdict.wrong == ["losses differ by inf, first at step 2"]


def test_every_kind_comes_equally_often_and_the_seed_decides():
    kinds = all_faults(Path("world"), small_disk=True)
    assert len(kinds) == 4 * len(SIGNALS) + 4
    plan = chosen(kinds, 3 * len(kinds), random.Random(7))
    names = [fault.name for fault, _ in plan]
    assert {names.count(kind.name) for kind in kinds} == {3}
    assert plan == chosen(kinds, 3 * len(kinds), random.Random(7))
    assert plan != chosen(kinds, 3 * len(kinds), random.Random(8))
    assert any(early for _, early in plan)
