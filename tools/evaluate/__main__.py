"""Evaluates a model: one door for all suites, and for the comparison of what they found.

    moss-eval --checkpoint RUN                        held-out samples of the toy world
    moss-eval --checkpoint RUN --suite FILE.jsonl     samples of a file or a folder of shards
    moss-eval --checkpoint EXPORT --suite seed25      the 25 benchmarks of the seed's table
    moss-eval --checkpoint EXPORT --suite lmms        any tasks of lmms-eval
    moss-eval --checkpoint EXPORT --suite streaming   benchmarks of streams
    moss-eval compare RUN RUN                         two runs of a suite, item by item

`moss-eval --suite SUITE --help` lists the options of a suite.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from data_pipeline.commands import WRONG_USAGE, describe, report_error
from moss_train.imports import quick_imports

Command = Callable[[list[str]], int]


def _streaming(arguments: list[str]) -> int:
    from tools.evaluate.streaming import main

    return main(arguments)


def _benchmarks(arguments: list[str]) -> int:
    from tools.evaluate.seed25 import main

    return main(arguments)


TOY = "toy"
# Suites with a command of their own, which gets the whole command line.
SUITES: Mapping[str, Command] = {
    "seed25": _benchmarks,
    "lmms": _benchmarks,
    "streaming": _streaming,
}


def _samples(arguments: list[str]) -> int:
    with quick_imports():
        from tools.evaluate.samples import main  # takes seconds to import

    return main(arguments)


def _compare(arguments: list[str]) -> int:
    from tools.evaluate.compare import main

    return main(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command of the named suite; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["compare"]:
        return _compare(arguments[1:])
    try:
        return _run(suite_of(arguments), arguments)
    except OSError as error:
        if error.filename is None:
            raise
        return report_error("moss-eval", describe(error))


def _run(suite: str, arguments: list[str]) -> int:
    if suite not in ("", TOY, *SUITES) and not Path(suite).exists():
        suites = ", ".join((TOY, *SUITES))
        words = f"--suite {suite}: there is no such suite ({suites}), file or folder of samples"
        return report_error("moss-eval", words, WRONG_USAGE)
    if not suite and {"-h", "--help"} & set(arguments):
        print(__doc__)
    return SUITES.get(suite, _samples)(arguments)


def suite_of(arguments: list[str]) -> str:
    """The last value of `--suite`; "" where there is none."""
    found = ""
    for number, word in enumerate(arguments):
        if word == "--suite" and number + 1 < len(arguments):
            found = arguments[number + 1]
        elif word.startswith("--suite="):
            found = word.partition("=")[2]
    return found


if __name__ == "__main__":
    sys.exit(main())
