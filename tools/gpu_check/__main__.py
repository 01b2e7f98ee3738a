"""Checks this code on the GPU of this machine: is it right, how fast is it, where does time go?

Sections, each in its own process: the machine (products, copies, versions); losses of all stages on
the CPU and on the GPU; save and resume; training steps of the 11B model's shapes, with a profile of
each; a save of 3 B parameters. About ten minutes. A section that is done is not run again, unless
it was on another device, or with other code or packages: start the same command to go on. The exit
code is 0 where all that is done is correct, however fast it is.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from data_pipeline.atomic import write_atomically
from data_pipeline.commands import DONE, FAILED, CommandParser, report_error
from data_pipeline.parent import signalled_with_parent
from moss_train import hardware

PROGRAM = "python -m tools.gpu_check"


def main(arguments: list[str] | None = None) -> int:
    """Runs the sections that are asked for and not done yet; reports all findings, also as JSON."""
    from tools.gpu_check.report import PAGE, report
    from tools.gpu_check.sections import LIMITS, compare_losses
    from tools.gpu_check.setting import setting

    args = _parser(list(LIMITS)).parse_args(arguments)
    if args.one is not None:
        signalled_with_parent(os.getppid())
        return _run_one(args.one, args.rehearse, _file(args.out, args.one))
    if not args.rehearse and not hardware.has_accelerator():
        return report_error(PROGRAM, "torch finds no CUDA device: try --rehearse on a CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        here = setting(args.rehearse)
    except RuntimeError as error:
        return report_error(PROGRAM, error)
    for name in args.sections or LIMITS:
        path = _file(args.out, name)
        if not args.again and _kept(path, here) is not None:
            print(f"{name}: done before", flush=True)
            continue
        path.unlink(missing_ok=True)
        started = time.perf_counter()
        _run(name, args.rehearse, path, LIMITS[name], here)
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
    kept = {name: _kept(_file(args.out, name), here) for name in LIMITS}
    findings = {name: found for name, found in kept.items() if found is not None}
    for name in LIMITS:
        path = _file(args.out, name)
        if name not in findings and path.exists():
            print(f"{name}: left out: {path} is of another device, or of other code", flush=True)
    compare_losses(findings)
    print("\n" + report(findings, PAGE.read_text() if PAGE.exists() else ""), flush=True)
    write_atomically(args.out / "all.json", json.dumps(findings, indent=1) + "\n")
    return DONE if all(found["correct"] for found in findings.values()) else FAILED


def _parser(sections: list[str]) -> CommandParser:
    parser = CommandParser(PROGRAM, description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("gpu_check"), help="folder of findings, a file a section")
    add("--sections", nargs="+", choices=sections, metavar="NAME",
        help=f"some of them (default: all): {', '.join(sections)}")  # fmt: skip
    add("--again", action="store_true", help="run sections that are done again")
    add("--rehearse", action="store_true", help="small shapes, in this process, on the CPU")
    add("--one", help=f"run this section in this process: {PROGRAM} does so", choices=sections)
    return parser


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(' ', '_')}.json"


def _kept(path: Path, here: dict[str, str]) -> dict[str, Any] | None:
    """The findings of a section that was done in this setting; None where it was not."""
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    return found if found.get("setting") == here else None


def _run(name: str, rehearse: bool, path: Path, limit: float, here: dict[str, str]) -> None:
    """Runs a section, and notes in its findings in which setting."""
    if rehearse:
        _run_one(name, True, path)
    else:
        _run_process(name, path, limit)
    found = json.loads(path.read_text())
    write_atomically(path, json.dumps({**found, "setting": here}, indent=1) + "\n")


def _run_one(name: str, rehearse: bool, path: Path) -> int:
    from tools.gpu_check.sections import run_section

    found = run_section(name, "cpu" if rehearse else hardware.TRAINS, rehearse)
    write_atomically(path, json.dumps(found, indent=1) + "\n")
    return DONE


def _run_process(name: str, path: Path, limit: float) -> None:
    """Runs a section in a process; an error that ends it is its finding."""
    from tools.gpu_check.bounded import run_bounded

    command = [sys.executable, "-m", "tools.gpu_check", "--one", name, "--out", str(path.parent)]
    log = path.with_suffix(".log")
    code = run_bounded(command, log, limit)
    if not path.exists():
        ended = f"not done within {limit:g} s" if code is None else f"ended with {code}"
        error = f"{ended}: see {log}"
        write_atomically(path, json.dumps({"correct": False, "error": error}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
