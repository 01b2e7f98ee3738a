"""Runs benchmarks on an export that it serves: the 25 rows of MOSS-Video-Preview's table beside
the seed's own figures, or any tasks of lmms-eval.

lmms-eval has an environment of its own: `python -m tools.evaluate.lmms_environment` makes it. Data
sets are read from $HF_HOME, or downloaded to it, by lmms-eval.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.commands import CommandParser, finite_number, report_error, whole_number
from data_pipeline.synthesis.config import EndpointConfig
from inference.evaluate.harness.benchmarks import ZEROBENCH, Benchmark, chosen
from inference.evaluate.harness.lmms import Harness, TaskFailed, run_task, settings_of
from inference.evaluate.harness.server import KEY, MODEL, ExternalServer, Server, Serving
from inference.evaluate.harness.zerobench import ask, read_tsv
from inference.evaluate.results import (
    RESULTS,
    BenchmarkError,
    EvaluationRun,
    Item,
    ItemFile,
    Row,
    digest_of,
    mean_row,
    read_results,
)
from tools.evaluate.lmms_environment import DEFAULT, check_environment

PROGRAM = "python -m tools.evaluate --suite seed25"
ANY = "lmms"  # the suite of any tasks
_TIMEOUT = 1800.0  # seconds of a request


def main(arguments: list[str] | None = None) -> int:
    """Serves, asks, writes the table; returns 1 where requests failed, a row has no value, or a
    server ended."""
    options, parser = parse(arguments)
    try:
        rows = rows_of(options)
    except ValueError as error:
        parser.error(str(error))
    settings = {
        "fps": options.fps, "max_frames": options.frames, "max_tokens": options.max_tokens,
        "include": str(options.include or ""), "server": options.server or "",
        "limit": options.limit, "replicas": options.replicas,
    }  # fmt: skip
    try:
        if any(row.task for row in rows):
            check_environment(options.lmms)
        if any(not row.task for row in rows):
            options.questions = read_tsv(options.zerobench, options.limit)
        settings["questions"] = {
            name: digest_of(path)
            for name, path in ((ZEROBENCH, options.zerobench), ("include", options.include))
            if path
        }
        model, weights = str(options.checkpoint or options.url), None
        if options.url:
            weights = ExternalServer(options.url).weights
        with EvaluationRun(options.out, model, options.suite, settings, weights) as run:
            return _evaluate(options, run, rows)
    except BenchmarkError as error:
        return report_error(parser.prog, error)


def parse(arguments: list[str] | None) -> tuple[Any, CommandParser]:
    parser = CommandParser(PROGRAM, description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="DIR", help="export to serve")
    add("--url", metavar="URL", help="a server that runs, http://HOST:PORT, in place of an export")
    add("--suite", default="seed25", choices=("seed25", ANY), help="the seed's rows, or any tasks")
    add("--tasks", default="", metavar="A,B",
        help="rows of seed25 or lmms-eval's tasks (default: all 25 rows)")  # fmt: skip
    add("--out", type=Path, required=True, metavar="FOLDER", help="results; a run goes on there")
    add("--limit", type=whole_number(above=0), metavar="N", help="items of each row (default: all)")
    add("--replicas", type=whole_number(least=0), default=0, metavar="N",
        help="servers of the export, each on a GPU of its own; 0: one")  # fmt: skip
    add("--concurrency", type=whole_number(above=0), default=4, metavar="N",
        help="questions at once, of each server")  # fmt: skip
    add("--fps", type=finite_number(above=0), default=1.0, metavar="X", help="frames of a second")
    add("--frames", type=whole_number(above=0), default=256, metavar="N",
        help="maximum number of frames of a question; longer videos show fewer a second",
    )  # fmt: skip
    add("--max_tokens", type=whole_number(above=0), default=1024, metavar="N",
        help="maximum number of tokens of an answer; a task's own maximum holds too")  # fmt: skip
    add("--zerobench", type=Path, metavar="TSV", help="VLMEvalKit's zerobench_sub.tsv")
    add("--include", type=Path, metavar="FOLDER", help="more tasks of lmms-eval, as YAML")
    add("--media", type=Path, action="append", default=[], metavar="FOLDER",
        help="folder of videos beside $HF_HOME; may be given again")  # fmt: skip
    add("--lmms", type=Path, default=DEFAULT, metavar="FOLDER", help="lmms-eval's environment")
    add("--server", default="", metavar="FLAGS",
        help="more flags of the server, as one word: '--device cpu --dtype fp32'")  # fmt: skip
    options = parser.parse_args(arguments)
    if bool(options.checkpoint) == bool(options.url):
        parser.error("give --checkpoint DIR, or --url URL")
    if options.suite == ANY and not options.tasks:
        parser.error(f"--suite {ANY}: give --tasks")
    for folder in [*options.media, *([options.include] if options.include else [])]:
        if not folder.is_dir():
            parser.error(f"{folder}: is not a folder")
    return options, parser


def rows_of(options: Any) -> list[Benchmark]:
    """The rows to ask. ValueError: one is unknown, or needs a file that is not given."""
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if options.suite == ANY:
        return [Benchmark(name, name, video=True) for name in names]
    rows = chosen(names)
    if options.zerobench is None and any(row.name == ZEROBENCH for row in rows):
        if names:
            raise ValueError(f"{ZEROBENCH}: give --zerobench TSV")
        print(f"{ZEROBENCH}: is left out: there is no --zerobench TSV", file=sys.stderr)
        rows = [row for row in rows if row.name != ZEROBENCH]
    return rows


def _evaluate(options: Any, run: EvaluationRun, rows: Sequence[Benchmark]) -> int:
    found: list[Row] = []
    problems: list[str] = []
    with ExitStack() as stack:
        server: Server | ExternalServer
        if options.checkpoint:
            server = stack.enter_context(Server(_serving(options), run.out / "server.txt"))
        else:
            server = ExternalServer(options.url)
        for benchmark in rows:
            print(f"{benchmark.name} ...", file=sys.stderr, flush=True)
            file = run.items(benchmark.name)
            try:
                found.append(_row(options, run, benchmark, server, file))
            except TaskFailed as error:
                problems.append(f"{benchmark.name}: {error}")
            except BenchmarkError as error:  # the server has ended: what is done stays
                problems.append(f"{benchmark.name}: {error}")
                if not benchmark.task:
                    found.append(_answered(options, benchmark, server, file))
                break
    results = run.finish(_with_earlier(run.out, found, options.limit))
    print(results.text())
    for problem in problems:
        report_error(PROGRAM, problem)
    print(run.out / "results.html")
    return 1 if problems else results.exit_code


def _with_earlier(out: Path, found: Sequence[Row], limit: int | None) -> list[Row]:
    """The rows, after those that only an earlier run in the folder has asked. Of these, rows of
    another --limit say of which."""
    if not (out / RESULTS).exists():
        return [*found]
    earlier, names, rows = read_results(out), {row.row for row in found}, list[Row]()
    for row in earlier.rows:
        if row.row in names:
            continue
        asked = row.settings.get("limit", earlier.settings.get("limit") or "none")
        own = {name: value for name, value in row.settings.items() if name != "limit"}
        if asked != (limit or "none"):
            own["limit"] = asked
        rows.append(replace(row, settings=own))
    return [*rows, *found]


def _row(
    options: Any,
    run: EvaluationRun,
    benchmark: Benchmark,
    server: Server | ExternalServer,
    file: ItemFile,
) -> Row:
    concurrency = options.concurrency * max(1, options.replicas)
    if not benchmark.task:
        config = EndpointConfig(
            f"{server.url}/v1", MODEL, api_key_env=KEY, concurrency=concurrency, timeout=_TIMEOUT,
            temperature=0.0, max_tokens=options.max_tokens,
        )  # fmt: skip
        ask(options.questions, file, config, benchmark.name, server.check)
        return _answered(options, benchmark, server, file)
    harness = Harness(
        options.lmms / "bin/python", run.out / "lmms", options.fps, options.frames,
        options.max_tokens, concurrency, options.include, options.limit,
    )  # fmt: skip
    row, items = run_task(harness, benchmark, server.url, server.check)
    run.replace(benchmark.name, items)
    return Row(**{**vars(row), "settings": settings_of(harness, benchmark, server.resolution)})


def _answered(
    options: Any, benchmark: Benchmark, server: Server | ExternalServer, file: ItemFile
) -> Row:
    """ZeroBench's row, over the questions answered so far."""
    names = {question.index for question in options.questions}
    found = [item for name, item in file.items.items() if name in names]
    items: list[Item] = [
        {**item, "score": 100 * item["score"]} if "score" in item else item for item in found
    ]
    prompt = "VLMEvalKit, ZEROBench"
    settings = {"frames": "", "resolution": server.resolution, "prompt": prompt}
    return mean_row(
        benchmark.name, benchmark.metric, items, len(names), beside=benchmark.seed,
        settings=settings,
    )  # fmt: skip


def _serving(options: Any) -> Serving:
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    media = [folder for folder in (home, *options.media) if folder.is_dir()]
    return Serving(
        options.checkpoint, options.frames, options.concurrency, options.replicas, media,
        shlex.split(options.server),
    )  # fmt: skip
