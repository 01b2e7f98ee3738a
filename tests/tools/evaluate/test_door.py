"""The door to the suites: what it knows, and what it does with a name that it does not know."""

from __future__ import annotations

import pytest

from data_pipeline.commands import FAILED, WRONG_USAGE
from tools.evaluate.__main__ import SUITES, main


def test_a_suite_that_is_not_known_is_refused_with_those_that_are(capsys):
    assert main(["--checkpoint", "somewhere", "--suite", "seed52"]) == WRONG_USAGE
    error = capsys.readouterr().err
    assert error.startswith("moss-eval: error: --suite seed52: there is no such suite")
    assert all(name in error for name in ("toy", *SUITES))


def test_help_names_all_suites(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert all(f"--suite {name}" in told for name in SUITES)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--suite streaming --toy-events 2", "give --checkpoint DIR, or --url URL"),
        ("--suite streaming --checkpoint X", "give --benchmark or --toy-events"),
        ("--suite streaming --checkpoint X --toy-events 2 --toy-interruptions 3",
         "--toy-interruptions 3: are more than --toy-events 2"),
        ("--suite streaming --checkpoint X --toy-events 2 --limit 0",
         "limit=0: must be greater than 0"),
        ("--suite streaming --checkpoint X --toy-events 0", "0: must be greater than 0"),
        ("--suite lmms --checkpoint X", "--suite lmms: give --tasks"),
        ("--suite lmms --checkpoint X --tasks a --limit 0", "0: must be greater than 0"),
        ("--suite lmms --checkpoint X --tasks a --media nowhere", "nowhere: is not a folder"),
        ("--suite seed25 --checkpoint X --tasks MMLU", "MMLU: is no row of seed25"),
        ("--suite seed25 --checkpoint X --tasks ZeroBench(Sub)", "give --zerobench TSV"),
    ],
)  # fmt: skip
def test_wrong_usage_is_said_before_anything_is_read(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([*words.split(), "--out", str(tmp_path / "out")])
    assert end.value.code == WRONG_USAGE
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_results_that_could_not_be_written_are_said_before_the_samples_are_asked(tmp_path, capsys):
    (tmp_path / "config.json").touch()
    out = tmp_path / "gone/scores.json"
    assert main(["--checkpoint", str(tmp_path), "--out", str(out)]) == FAILED
    assert f"{out}: cannot be written" in capsys.readouterr().err
