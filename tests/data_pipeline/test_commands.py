"""What every command has: help with defaults, one line for an error, the exit codes."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
import yaml

from data_pipeline.commands import (
    CommandParser,
    finite_number,
    one_line,
    report_error,
    whole_number,
)
from tests.conftest import REPO


def test_help_has_the_form_of_argparse_with_defaults(capsys):
    parser = CommandParser("python -m tools.thing", description="Does a thing.\n\nSlowly.")
    shown = parser.add_subparsers().add_parser("show")
    shown.add_argument("--size", type=int, default=5, help="size in MB")
    shown.add_argument("--from", type=int, default=0, help="first step")
    shown.add_argument("--stages", nargs="+", default=["pt1", "sft"], help="stages")
    shown.add_argument("--files", nargs="*", default=(), help="files beside them")
    shown.add_argument("--dry", action="store_true", help="change nothing")
    shown.add_argument("--out", help="file to write (default: stdout)")
    with pytest.raises(SystemExit):
        parser.parse_args(["show", "--help"])
    lines = " ".join(capsys.readouterr().out.split())
    assert "usage: python -m tools.thing show" in lines
    assert "size in MB (default: 5)" in lines
    assert "first step (default: 0)" in lines
    assert "stages (default: pt1 sft)" in lines
    assert "files beside them --dry" in lines
    assert lines.endswith("change nothing --out OUT file to write (default: stdout)")


def test_a_flag_cannot_be_abbreviated(capsys):
    parser = CommandParser("python -m tools.thing")
    parser.add_argument("--workers")
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--work", "3"])
    assert capsys.readouterr().err.endswith(
        "python -m tools.thing: error: unrecognized arguments: --work 3\n"
    )


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (["--workers", "0"], "argument --workers: 0: must be greater than 0"),
        (["--workers", "1.5"], "argument --workers: 1.5: must be a whole number, greater than 0"),
        (["--workers", "x"], "argument --workers: x: must be a whole number, greater than 0"),
        (["--speed", "nan"], "argument --speed: nan: must be a finite number, 0 or more"),
        (["--speed", "x"], "argument --speed: x: must be a finite number, 0 or more"),
        (["--speed", "inf"], "argument --speed: inf: must be a finite number, 0 or more"),
    ],
)
def test_a_number_out_of_range_is_refused(capsys, value, says):
    parser = CommandParser("python -m tools.thing")
    parser.add_argument("--workers", type=whole_number(above=0))
    parser.add_argument("--speed", type=finite_number(least=0))
    given = parser.parse_args(["--workers", "3", "--speed", "0"])
    assert (given.workers, given.speed) == (3, 0.0)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(value)
    assert capsys.readouterr().err.splitlines()[-1] == f"python -m tools.thing: error: {says}"


def test_a_url_is_no_path(capsys, tmp_path, monkeypatch):
    """It would be made as a folder named s3: of the working folder."""
    monkeypatch.chdir(tmp_path)
    parser = CommandParser("x")
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--out", type=Path)
    for arguments in (["--out", "s3://b/x"], ["a", "s3://b/x"]):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(arguments)
        assert capsys.readouterr().err.endswith("s3://b/x: is a URL: give a path of this machine\n")
    Path("a:").mkdir()
    Path("ab:/x").mkdir(parents=True)  # some name their folders so
    assert parser.parse_args(["a:/b", "--out", "ab:/x"]).out == Path("ab:/x")


def test_an_error_of_ours_reads_like_one_of_argparse(capsys):
    assert report_error("python -m tools.thing", ValueError("size: 3: must be even")) == 1
    said = capsys.readouterr()
    assert said.err == "python -m tools.thing: error: size: 3: must be even\n"
    assert said.out == ""


def test_what_an_error_says_is_a_line_without_the_file(tmp_path):
    with pytest.raises(FileNotFoundError) as missing:
        (tmp_path / "a.yaml").read_text()
    assert one_line(missing.value) == "No such file or directory"
    with pytest.raises(yaml.YAMLError) as broken:
        yaml.safe_load("a: [1\nb: 2")
    assert "\n" in str(broken.value)
    assert one_line(broken.value) == " ".join(str(broken.value).split())


def test_every_command_has_this_parser():
    packages = ("data_pipeline", "inference", "launch", "moss_train", "tools")
    own = [
        path.relative_to(REPO)
        for package in packages
        for path in (REPO / package).rglob("*.py")
        if re.search(r"argparse\.ArgumentParser\(", path.read_text())
    ]
    assert own == []


def test_signs_that_an_encoding_does_not_have_are_printed_all_the_same(monkeypatch) -> None:
    """As with PYTHONIOENCODING=ascii, or in a locale that is not UTF-8."""
    for encoding, expected in (("ascii", b"\\u65e5\n"), ("utf-8", "日\n".encode())):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
        CommandParser("python -m x").parse_args([])
        print("日", flush=True)
        assert written.getvalue() == expected
