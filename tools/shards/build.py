"""`build`: an import in parts, by processes of this machine, tasks of Ray, or ranks of srun.

SOURCE and its options are those of `moss-data import`. Its records are shared out to --parts parts,
whatever makes them: the shards are the same, byte for byte, from every engine and any number of
machines. A killed worker or machine costs the part that it was making. OUT must be a folder that
all machines see.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from data_pipeline import build
from data_pipeline.commands import DONE, FAILED, STOPPED, finite_number, report_error, whole_number
from data_pipeline.engines.collect import collect
from data_pipeline.engines.job import Job, check_parts
from data_pipeline.engines.local import run_local
from data_pipeline.engines.ranks import RunRank, run_parts, run_rank
from data_pipeline.engines.ray_tasks import run_ray
from data_pipeline.progress import Progress

ENGINES = ("local", "ray", "slurm")


def add_options(parser: argparse.ArgumentParser) -> None:
    build.add_options(parser)
    add = parser.add_argument
    add("--engine", choices=ENGINES, default="local",
        help="local: --workers processes; ray: tasks on a cluster; slurm: ranks that srun or "
        "torchrun start")  # fmt: skip
    add("--parts", type=whole_number(above=0), default=32, metavar="N",
        help="parts; some for each core that works")  # fmt: skip
    add("--resume", action="store_true",
        help="go on with the build that OUT holds (default: it is refused)")  # fmt: skip
    add("--retries", type=whole_number(least=0), default=3, metavar="N",
        help="local, ray: times that a part is made again whose worker was killed")  # fmt: skip
    add("--ray-address", metavar="HOST:PORT",
        help="cluster (default: RAY_ADDRESS, one that runs here, or a new one)")  # fmt: skip
    add("--silence", type=finite_number(above=0), default=60.0, metavar="SECONDS",
        help="slurm: time without a sign after which a rank is taken for killed")  # fmt: skip


def build_in_parts(args: argparse.Namespace, program: str) -> int:
    """The build that `add_options` describes; returns the exit code. Raises ShardError."""
    options = replace(build.options_of(args), workers=0)
    job = Job(str(Path(args.source).absolute()) if Path(args.source).exists() else args.source,
              str(args.out.absolute()), options, args.parts)  # fmt: skip
    mine = run_rank() if args.engine == "slurm" else None
    try:
        if job.begin(args.resume, mine.run if mine else ""):
            print(f"{args.out}: finished already, nothing to do", file=sys.stderr)
        else:
            _make(args, job, mine)
        summary = collect(job, max(1, args.workers))
    except KeyboardInterrupt:
        return report_error(program, "interrupted: --resume goes on", STOPPED)
    if mine is None or mine.rank == 0:
        build.print_summary(args.out, summary)
    return DONE if summary.imported else FAILED


def _make(args: argparse.Namespace, job: Job, mine: RunRank | None) -> None:
    progress = Progress("build", len(job.missing()), unit="parts")
    done = _counted(job, progress)
    if mine is not None:
        run_parts(job, mine, args.silence, done)
    elif args.engine == "ray":
        run_ray(job, args.ray_address, args.retries, done)
    else:
        run_local(job, max(1, args.workers), args.retries, done)
    progress.end()


def _counted(job: Job, progress: Progress) -> Callable[[int], None]:
    def done(number: int) -> None:
        check_parts(job)
        progress.step()

    return done
