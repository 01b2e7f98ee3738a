"""Checks this code on the GPU of this machine: is it right, how fast is it, where does time go?

Sections, each in its own process: the machine (products, copies, versions); losses of all stages on
the CPU and on the GPU; save and resume; training steps of the 11B model's shapes, with a profile of
each; a save of 3 B parameters. About ten minutes. A section that is done is not run again: start
the same command to go on. The exit code is 0 where all that is done is correct, however fast it is.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from data_pipeline.atomic import write_atomically
from data_pipeline.commands import DONE, FAILED, CommandParser, report_error
from moss_train import hardware

PROGRAM = "python -m tools.gpu_check"


def main(arguments: list[str] | None = None) -> int:
    """Runs the sections that are asked for and not done yet; reports all findings, also as JSON."""
    from tools.gpu_check.report import PAGE, report
    from tools.gpu_check.sections import LIMITS, compare_losses

    args = _parser(list(LIMITS)).parse_args(arguments)
    if args.one is not None:
        return _run_one(args.one, args.rehearse, args.out)
    if not args.rehearse and not hardware.has_accelerator():
        return report_error(PROGRAM, "torch finds no CUDA device: try --rehearse on a CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.sections or LIMITS:
        path = _file(args.out, name)
        started = time.perf_counter()
        if args.again or not path.exists():
            path.unlink(missing_ok=True)
            if args.rehearse:
                _run_one(name, True, args.out)
            else:
                _run_process(name, args.out, LIMITS[name])
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
    paths = {name: _file(args.out, name) for name in LIMITS}
    findings = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
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


def _run_one(name: str, rehearse: bool, folder: Path) -> int:
    from tools.gpu_check.sections import run_section

    found = run_section(name, "cpu" if rehearse else hardware.TRAINS, rehearse)
    write_atomically(_file(folder, name), json.dumps(found, indent=1) + "\n")
    return DONE


def _run_process(name: str, folder: Path, limit: float) -> None:
    """Runs a section in a process; an error that ends it is its finding."""
    command = [sys.executable, "-m", "tools.gpu_check", "--one", name, "--out", str(folder)]
    log, path = _file(folder, name).with_suffix(".log"), _file(folder, name)
    with log.open("w") as out:
        try:
            code = subprocess.run(command, stdout=out, stderr=out, timeout=limit).returncode
            error = f"ended with {code}: see {log}"
        except subprocess.TimeoutExpired:
            error = f"not done within {limit:g} s: see {log}"
    if not path.exists():
        write_atomically(path, json.dumps({"correct": False, "error": error}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
