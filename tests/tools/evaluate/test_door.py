"""The door to the suites: what it knows, and what it does with a name that it does not know."""

from __future__ import annotations

import pytest

from data_pipeline.commands import WRONG_USAGE
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
