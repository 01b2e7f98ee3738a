"""Two commits of a small repository whose benchmark is a file of numbers."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import pytest

from tools.bench import versus

# Each run takes the next line: what it says of (seconds, tokens/s).
BENCH = """
import json, pathlib, sys
here = pathlib.Path(__file__).parent
turn = pathlib.Path({turns!r}) / here.parent.parent.name
number = int(turn.read_text()) if turn.exists() else 0
turn.write_text(str(number + 1))
seconds, rate = json.loads((here / "numbers.json").read_text())[number]
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
rows = [{{"name": "decision", "unit": "ms", "ours": seconds, "more_is_better": False}},
        {{"name": "decode", "unit": "tokens/s", "ours": rate, "more_is_better": True}}]
(out / f"bench-{{sys.argv[1]}}.json").write_text(json.dumps({{"rows": rows}}))
"""


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Before: 10 ms and 100 tokens/s in three rounds. Now: slower decisions, faster tokens."""
    folder = tmp_path / "repository"
    bench, turns = folder / "inference/bench", tmp_path / "turns"
    bench.mkdir(parents=True)
    turns.mkdir()
    (folder / "inference/__init__.py").touch()
    (bench / "__init__.py").touch()
    (bench / "__main__.py").write_text(BENCH.format(turns=str(turns)))
    git(folder, "init", "--quiet")
    for numbers in ([[10, 100], [10, 100], [20, 100]], [[12, 200], [11, 300], [23, 250]]):
        (bench / "numbers.json").write_text(json.dumps(numbers))
        git(folder, "add", "-A")
        git(folder, "commit", "-qm", "numbers")
    return folder


def test_two_commits_take_turns_and_their_figures_are_compared(repository: Path) -> None:
    figures = versus.compare(repository, "HEAD~1", ["stream", "--threads", "1"], rounds=3)
    decision, decode = figures
    assert decision.ratios == pytest.approx([1.2, 1.1, 1.15])
    assert decode.ratios == pytest.approx([1 / 2, 1 / 3, 1 / 2.5])
    assert [decision.is_worse(allowed) for allowed in (0.1, 0.2)] == [True, False]
    assert not decode.is_worse(0)
    assert versus.table(figures).splitlines()[1].split() == [
        "decision", "10", "12", "1.150x", "1.100-1.200", "ms",
    ]  # fmt: skip
    listed = subprocess.run(
        ["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True
    )
    assert len(listed.stdout.splitlines()) == 1  # what was checked out has been removed


def test_a_figure_that_is_not_worse_in_every_round_is_not_called_so() -> None:
    figure = versus.Figure("decision", "ms", False, [10, 10, 10], [12, 9.9, 12])
    assert not figure.is_worse(0.03)


def test_figures_of_zero_have_a_ratio() -> None:
    """Of frames that were dropped, or tokens of a session that has ended."""
    assert versus.Figure("dropped", "", False, [0, 0, 4], [0, 2, 0]).ratios == [1.0, math.inf, 0.0]
    assert versus.Figure("rate", "", True, [0, 2, 0], [0, 0, 4]).ratios == [1.0, math.inf, 0.0]
    assert versus.Figure("dropped", "", False, [0, 0, 0], [2, 1, 3]).is_worse(0.03)


def test_the_command_ends_with_1_where_something_is_slower(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(versus, "REPO", repository)
    assert versus.main(["HEAD~1", "--rounds", "3", "--bench", "offline --threads 1"]) == 1
    said = capsys.readouterr()
    assert "slower than HEAD~1: decision" in said.err
    assert "0.400x" in said.out


def test_what_git_or_a_benchmark_says_is_passed_on(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(versus, "REPO", repository)
    assert versus.main(["nothing"]) == 1
    assert "invalid reference: nothing" in capsys.readouterr().err
    (repository / "inference/bench/__main__.py").write_text("raise SystemExit('out of order')")
    assert versus.main(["HEAD", "--rounds", "1"]) == 1
    assert "out of order" in capsys.readouterr().err
