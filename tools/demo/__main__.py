"""Trains a real-time model on the toy world, evaluates it, and lets it watch a clip live.

The model starts from weights that are shipped with the code: the toy model after its third stage.
--full trains all four stages from random weights instead. All figures are of held-out worlds.
OUT/report.html shows everything; what is finished already is not done again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.atomic import write_atomically
from data_pipeline.cgroups import cores
from data_pipeline.commands import FAILED, CommandParser, finite_number, report_error, whole_number
from tools import preloaded
from tools.demo.parts import RECORD, Part, full, short

PROGRAM = "python -m tools.demo"


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo; returns the exit code of the first command that fails, or 0."""
    options = _parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    parts = full(options) if options.full else short(options)
    try:
        run_all(parts, options.out / RECORD)
    except subprocess.CalledProcessError as error:
        failed = f"{' '.join(map(str, error.cmd))} ended with exit code {error.returncode}"
        return report_error(PROGRAM, failed, error.returncode or FAILED)
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(PROGRAM, description=__doc__)
    add = parser.add_argument
    add("--full", action="store_true", help="train all four stages, from random weights")
    add("--out", type=Path, metavar="FOLDER",
        help="folder of the demo (default: runs/demo, with --full runs/demo-full)")  # fmt: skip
    add("--train", type=whole_number(above=0), metavar="N",
        help="training samples of each source (default: 1500, with --full 8000)")  # fmt: skip
    add("--heldout", type=whole_number(above=0), metavar="N",
        help="held-out samples of each source (default: 60, with --full 200)")  # fmt: skip
    add("--ranks", type=whole_number(above=0), default=min(2, cores()), metavar="N",
        help="processes that train")  # fmt: skip
    add("--scale", type=finite_number(above=0), default=1.0, metavar="X",
        help="factor of the samples that each stage trains on")  # fmt: skip
    add("overrides", nargs="*", metavar="FIELD=VALUE",
        help="field of the configuration of all stages, such as model.dtype=bf16")  # fmt: skip
    options = parser.parse_args(arguments)
    options.out = options.out or Path("runs/demo-full" if options.full else "runs/demo")
    return options


def run_all(parts: Sequence[Part], record: Path) -> None:
    """Runs the parts in their order; those that `record` names are finished.

    Raises:
        subprocess.CalledProcessError: a part has failed.
    """
    earlier = json.loads(record.read_text()) if record.exists() else []
    done = {part["name"]: part for part in earlier}
    spent = expected = 0.0
    for number, part in enumerate(parts, 1):
        if part.name in done:
            continue
        # Other machines are as much slower or faster in all parts as they were so far.
        pace = min(max(spent / expected, 0.2), 20.0) if expected > 10 else 1.0
        left = pace * sum(p.seconds for p in parts[number - 1 :] if p.name not in done)
        about = f"{pace * part.seconds:.0f} s, {_clock(left)} to the end of the demo"
        print(f"\n--- {number}/{len(parts)} {part.name} (about {about})", flush=True)
        if part.makes is not None:
            shutil.rmtree(part.makes, ignore_errors=True)  # of a demo that was stopped just then
        started = time.perf_counter()
        run(part)
        seconds = round(time.perf_counter() - started, 1)
        spent, expected = spent + seconds, expected + part.seconds
        done[part.name] = {"name": part.name, "command": part.command, "seconds": seconds}
        so_far = [done[p.name] for p in parts if p.name in done]
        write_atomically(record, json.dumps(so_far, indent=1) + "\n")


def run(part: Part) -> None:
    """Runs a command. Raises CalledProcessError where it fails."""
    if not part.ranks:
        preloaded.run(part.module, *part.arguments)
        return
    ranks = ["--nproc-per-node", str(part.ranks)]
    script = Path(importlib.import_module(part.module).__file__ or "").parent / "__main__.py"
    arguments = preloaded.torchrun(ranks, script, list(part.arguments))
    preloaded.run("torch.distributed.run", *arguments)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


if __name__ == "__main__":
    sys.exit(main())
