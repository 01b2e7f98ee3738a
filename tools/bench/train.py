"""Speed of the training job against transformers' Mllama under plain PyTorch and DDP.

    python -m tools.bench.train --data toy_world [--stage pt1 pt2] [--layouts single tp2 pp2 dp2]

transformers gets --micro-batch samples in a microbatch (it is fastest with 8); ours takes all of a
rank's samples as one packed microbatch, but for pipelines, which need several. Every contestant is
a group of processes that sets up once and then waits; they take turns of a few steps on the same
samples, so that the machine's noise hits all. Speeds are medians over turns, ratios medians of the
ratios within a round. Both sides compute the same: losses are compared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch

from data_pipeline.batch import MicroBatch
from moss_train import hardware
from moss_train.config import Config, from_dict, to_dict

REPO = Path(__file__).resolve().parents[2]
LAYOUTS = {"single": 1, "tp2": 2, "pp2": 2, "dp2": 2}
PIPELINE_SAMPLES = (
    4  # at most so many share a microbatch in a pipeline, which needs several of them
)
BASELINES = {1: "HF", 2: "HF DDP"}
AGREE = 1e-4  # relative difference of losses that is taken for the same arithmetic


def serve(job: dict[str, Any]) -> None:
    """A rank of a contestant: does as many steps as each line on stdin says, answers in JSON."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print goes to the log
    config = from_dict(job["config"])
    if job["side"] == "data":
        replies.write(json.dumps(prepare(config, job)) + "\n")
        return
    config.hardware.threads = max(1, len(os.sched_getaffinity(0)) // int(os.environ["WORLD_SIZE"]))
    step = _hf_step(config, job) if job["side"] == "hf" else _our_step(config, job)
    replies.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        torch.distributed.barrier()
        began = time.perf_counter()
        losses, padded = zip(*(step() for _ in range(int(line))), strict=True)
        torch.distributed.barrier()
        seconds = time.perf_counter() - began
        reply = {"seconds": seconds, "losses": losses, "padded": sum(padded)}
        reply["start_gb"] = job["start_gb"]
        replies.write(json.dumps(reply | {"peak_gb": hardware.peak_memory_gb()}) + "\n")
    torch.distributed.destroy_process_group()


def _microbatches(job: dict[str, Any], replica: int, replicas: int) -> Iterator[MicroBatch]:
    """This replica's microbatches, step after step: every `replicas`-th of all."""
    batches = torch.load(Path(job["folder"]) / "batches.pt", weights_only=False)
    return itertools.cycle(batches[replica::replicas])


Step = Callable[[], tuple[float, float]]  # loss, and this rank's part of all tokens with padding


def _our_step(config: Config, job: dict[str, Any]) -> Step:
    from moss_train.train.loop import Job
    from moss_train.train.process import start_process_group

    job["start_gb"] = hardware.peak_memory_gb()  # imports only: nothing has been built yet
    start_process_group(config)
    training = Job(config, None)
    if training.reader.loader is not None:  # it has not begun to read
        training.reader.loader.close()
        groups = training.groups
        training.reader.batches = _microbatches(job, groups.data_rank, groups.data_size)
    pipelined = config.parallel.pipeline > 1
    samples = PIPELINE_SAMPLES if pipelined else config.data.global_batch
    training.reader.bounds = replace(training.reader.bounds, samples=samples)

    def step() -> tuple[float, float]:
        result = training.step(training._read())
        return result.loss, result.padded_tokens / torch.distributed.get_world_size()

    return step


def _hf_step(config: Config, job: dict[str, Any]) -> Step:
    from tools.bench._hf_train import join, make_step

    job["start_gb"] = hardware.peak_memory_gb()
    batches = _microbatches(job, *join(config))
    weights = torch.load(Path(job["folder"]) / "weights.pt")
    return make_step(config, batches, weights, job["warmup"])


def prepare(config: Config, job: dict[str, Any]) -> dict[str, float]:
    """Reads the microbatches and exports our random initialization, for all contestants."""
    from moss_train.convert.weights import export
    from moss_train.train.loop import Job
    from moss_train.train.process import start_process_group

    start_process_group(config)
    training = Job(config, None)
    reads, loader = cast(Any, training.reader.batches), cast(Any, training.reader.loader)
    batches = [next(reads)]  # the first waits for the loader's processes to start
    began = time.perf_counter()
    batches += [next(reads) for _ in range(max(job["microbatches"] - 1, 50))]
    rate = (len(batches) - 1) * config.data.micro_batch / (time.perf_counter() - began)
    loader.close()
    torch.save(batches[: job["microbatches"]], Path(job["folder"]) / "batches.pt")
    torch.save(export(training.model), Path(job["folder"]) / "weights.pt")
    torch.distributed.destroy_process_group()
    return {"samples_per_s": rate}


def _free_port() -> int:
    """A port that nobody listens on, below those that outgoing connections take: contestants that
    start at once would otherwise now and then take each other's."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise RuntimeError("no free port between 20000 and 30000")


class Contestant:
    """The processes of one side in one layout."""

    def __init__(self, name: str, ranks: int, job: dict[str, Any]):
        self.name, self.ranks = name, ranks
        self.losses: list[float] = []
        self.padded = 0.0  # tokens of all steps, with padding
        self.turns: list[dict[str, Any]] = []
        stem = Path(job["folder"]) / name.replace(" ", "-")
        spec = stem.with_suffix(".json")
        spec.write_text(json.dumps(job))
        shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        self.logs = [stem.with_suffix(f".{rank}.log") for rank in range(ranks)]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tools.bench.train", "--worker", str(spec)],
                cwd=REPO,
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log.open("w"),
                text=True,
            )
            for rank, log in enumerate(self.logs)
        ]

    def answers(self) -> list[dict[str, Any]]:
        """The next line of every rank."""
        lines = [cast(Any, process.stdout).readline() for process in self.processes]
        if not all(lines):
            logs = "\n".join(log.read_text()[-4000:] for log in self.logs)
            raise RuntimeError(f"{self.name} failed:\n{logs}")
        return [json.loads(line) for line in lines]

    def turn(self, steps: int) -> dict[str, Any]:
        """Runs `steps` steps on all ranks; the memory is of the rank that uses most."""
        for process in self.processes:
            cast(Any, process.stdin).write(f"{steps}\n")
            cast(Any, process.stdin).flush()
        answers = self.answers()
        self.losses += answers[0]["losses"]
        self.padded += sum(answer["padded"] for answer in answers)
        return max(answers, key=lambda answer: answer["peak_gb"])

    def close(self) -> None:
        """Lets the processes end, or ends them."""
        for process in self.processes:
            cast(Any, process.stdin).close()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def run_stage(args: argparse.Namespace, stage: str) -> dict[str, Any]:
    """All contestants on one stage."""
    from moss_train.validate import validate
    from tools.bench._hf_train import comparable_config

    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        run = Path(name) / "run"
        configs = {
            layout: comparable_config(
                stage,
                args.model,
                layout,
                args.data,
                run,
                [f"data.micro_batch={args.micro_batch}", *args.set],
            )
            for layout in dict.fromkeys(["single", *args.layouts])
        }
        for layout, config in configs.items():
            validate(config, LAYOUTS[layout])
        data = configs["single"].data
        per_step = data.global_batch // data.micro_batch
        count = (args.warmup + args.rounds * args.steps) * per_step
        job = {"folder": name, "warmup": args.warmup, "microbatches": count}

        def start(who: str, ranks: int, side: str, layout: str) -> Contestant:
            own = {**job, "side": side, "config": to_dict(configs[layout])}
            contestant = Contestant(who, ranks, own)
            stack.callback(contestant.close)
            return contestant

        (loader,) = start("data", 1, "data", "single").answers()
        teams = []
        for ranks in sorted({LAYOUTS[layout] for layout in args.layouts}):
            teams.append(start(BASELINES[ranks], ranks, "hf", "single"))
            teams += [start(x, ranks, "ours", x) for x in args.layouts if LAYOUTS[x] == ranks]
        for team in teams:
            team.answers()
            team.turn(args.warmup)
        for number in range(args.rounds):
            for team in teams if number % 2 == 0 else teams[::-1]:
                team.turns.append(team.turn(args.steps))
        batches = torch.load(Path(name) / "batches.pt", weights_only=False)
    real = sum(int(batch.lengths.sum()) for batch in batches)
    rows = summarize(teams, batches[args.warmup * per_step :], args, data.global_batch, real)
    return {"stage": stage, "loader_samples_per_s": loader["samples_per_s"], "rows": rows}


def summarize(
    teams: list[Contestant],
    batches: list[MicroBatch],
    args: argparse.Namespace,
    samples: int,
    real: int,
) -> list[dict[str, Any]]:
    """One row for each contestant: medians over its turns, ratios to the baseline's turns.

    `batches` are the microbatches of the measured steps, each of `samples` samples; `real` counts
    the tokens of all steps, without padding.
    """
    size = len(batches) // args.rounds
    turns = [batches[i : i + size] for i in range(0, len(batches), size)]
    tokens = [sum(int(b.lengths.sum()) for b in turn) for turn in turns]
    frames = [sum(len(b.frame_rows) for b in turn) for turn in turns]
    baselines = {team.ranks: team for team in teams if team.name in BASELINES.values()}
    rows = []
    for team in teams:
        base = baselines[team.ranks]
        seconds = [turn["seconds"] for turn in team.turns]
        ratios = [b["seconds"] / s for b, s in zip(base.turns, seconds, strict=True)]
        pairs = list(zip(team.losses, base.losses, strict=True))[: args.warmup]
        last = team.turns[-1]
        rows.append(
            {
                "name": team.name,
                "ranks": team.ranks,
                "steps_per_s": args.steps / median(seconds),
                "samples_per_s": args.steps * samples / median(seconds),
                "tokens_per_s": median(map(truediv, tokens, seconds)),
                "frames_per_s": median(map(truediv, frames, seconds)),
                "peak_gb": last["peak_gb"],
                "padding": 1 - real / team.padded,
                "built_gb": last["peak_gb"] - last["start_gb"],
                "ratio": None if team is base else median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                "losses": team.losses,
                "apart": max(abs(a - b) / abs(b) for a, b in pairs),
            }
        )
    return rows


def table(result: dict[str, Any]) -> str:
    """The rows as text."""
    rate = result["loader_samples_per_s"]
    lines = [
        f"stage {result['stage']} (the loader alone reads {rate:.0f} samples/s)",
        "layout  ranks  steps/s  samples/s  tokens/s  padding  frames/s  peak GB (over imports)"
        "  ours/HF (range)    first loss",
    ]
    for row in result["rows"]:
        low, high = row["ratio_range"]
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f} ({low:.2f}-{high:.2f})"
        memory = f"{row['peak_gb']:.2f} ({row['built_gb']:.2f})"
        lines.append(
            f"{row['name']:8}{row['ranks']:5}  {row['steps_per_s']:7.2f}  "
            f"{row['samples_per_s']:9.1f}  {row['tokens_per_s']:8.0f}  {row['padding']:7.0%}  "
            f"{row['frames_per_s']:8.0f}  {memory:22}  {ratio:17}  {row['losses'][0]:.6f}"
        )
    apart = max(row["apart"] for row in result["rows"])
    verdict = "agree" if apart <= AGREE else "DIFFER"
    lines.append(f"losses of the warm-up steps {verdict}: {apart:.1e} relative (limit {AGREE:.0e})")
    return "\n".join(lines)


def main() -> int:
    """Prints a table for each stage; 1 if the two sides do not compute the same."""
    parser = argparse.ArgumentParser(description="Training speed against transformers.")
    parser.add_argument("--stage", nargs="+", default=["pt1", "pt2"], choices=["pt1", "pt2"])
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--model", default="toy", help="a preset of conf/model")
    parser.add_argument("--micro-batch", type=int, default=8, help="samples of a microbatch")
    parser.add_argument("--data", default="toy_world", type=os.path.abspath, help="the toy world")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contestant")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the first turn")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=VALUE", help="for both sides"
    )
    parser.add_argument("--json", type=Path, help="writes all numbers here")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(json.loads(args.worker.read_text()))
        return 0
    about = {"cpus": len(os.sched_getaffinity(0)), "torch": torch.__version__}
    about["load_before"] = round(os.getloadavg()[0], 2)
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    results = []
    for stage in args.stage:
        results.append(run_stage(args, stage))
        print(f"\n{table(results[-1])}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"about": about, "stages": results}, indent=1) + "\n")
    return int(any(row["apart"] > AGREE for result in results for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
