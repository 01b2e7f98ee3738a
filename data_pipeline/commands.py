"""What all commands share: the form of their help, one line for an error, exit codes.

0    done
1    failed: the work could not be done, or what it checked is wrong
2    wrong usage: an argument, a flag or a field of a configuration
130  stopped before the end, by Ctrl-C, SIGTERM or a budget that was given
141  nobody reads the output any more (`| head`), as after SIGPIPE
"""

from __future__ import annotations

import argparse
import io
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.fields import Range, described

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # of a path: the second slash is lost

DONE, FAILED, WRONG_USAGE, STOPPED, PIPE_CLOSED = 0, 1, 2, 130, 141


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written; an option's default behind its help: `(default: 8)`."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        nothing = any(action.default is x for x in (None, False, argparse.SUPPRESS))
        nothing = nothing or action.default in ("", [], ())
        if nothing or not action.option_strings or "(default" in text:
            return text
        if isinstance(action.default, list | tuple):
            return f"{text} (default: {' '.join(map(str, action.default))})"
        return f"{text} (default: %(default)s)"


class CommandParser(argparse.ArgumentParser):
    """argparse's, with this form of help, also for subcommands; flags cannot be abbreviated."""

    def __init__(self, prog: str | None = None, **options: Any) -> None:
        """`prog`: the command as it is typed, `python -m MODULE`; `options`: argparse's own."""
        super().__init__(
            prog, **{"formatter_class": HelpFormatter, "allow_abbrev": False, **options}
        )

    def parse_known_args(self, *given: Any, **options: Any) -> Any:
        print_all_signs()
        parsed, rest = super().parse_known_args(*given, **options)
        for value in vars(parsed).values():
            for path in value if isinstance(value, list | tuple) else (value,):
                if isinstance(path, Path) and _URL.match(str(path)) and not path.exists():
                    written = str(path).replace(":/", "://", 1)
                    self.error(f"{written}: is a URL: give a path of this machine")
        return parsed, rest


def print_all_signs() -> None:
    """Names and answers may have signs that the encoding of the terminal or of a log does not have:
    from now on they are printed as `\\u65e5`, where they were an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def whole_number(**bounds: Any) -> Callable[[str], int]:
    """The `type` of an option that takes a whole number of `Range(**bounds)`."""
    return lambda text: _number(int, text, Range(**bounds))


def finite_number(**bounds: Any) -> Callable[[str], float]:
    """The `type` of an option that takes a finite number of `Range(**bounds)`."""
    return lambda text: _number(float, text, Range(**bounds))


def _number(kind: Callable[[str], Any], text: str, allowed: Range) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if value not in allowed:
        wanted = described(allowed, value, whole=kind is int)
        raise argparse.ArgumentTypeError(f"{text}: must be {wanted}")
    return value


def describe(error: OSError) -> str:
    """What the system said, of which file: `/data/x: Permission denied`."""
    known = error.filename is not None and error.strerror is not None
    return f"{error.filename}: {error.strerror}" if known else str(error)


def one_line(error: Exception) -> str:
    """What an error says, in one line, without the file: for a line that names it already."""
    message = error.strerror if isinstance(error, OSError) else None
    return message or " ".join(str(error).split())


def report_error(program: str, error: object, code: int = FAILED) -> int:
    """Prints `PROGRAM: error: ERROR` to stderr, as argparse does; returns the exit code."""
    print(f"{program}: error: {error}", file=sys.stderr, flush=True)
    return code
