"""Measures the speed of training, beside transformers' Mllama under plain PyTorch and DDP.

transformers gets --micro-batch samples in a microbatch (it is fastest with 8). Ours takes all of a
rank's samples as one packed microbatch; a pipeline needs several. Every contestant is a group of
processes that sets up once (contestant.py); they take turns of a few steps on the same samples, so
that other work on the machine affects all alike. Speeds are medians over turns, ratios medians of
the ratios within a round. Both sides must compute the same losses.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import ExitStack
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Any

import torch

from data_pipeline.batch import MicroBatch
from data_pipeline.commands import CommandParser
from data_pipeline.tables import format_table
from moss_train.config import to_dict
from tools.bench.contestant import Contestant
from tools.differences import largest, relative

REPO = Path(__file__).resolve().parents[2]
LAYOUTS = {"single": 1, "tp2": 2, "pp2": 2, "dp2": 2}
BASELINES = {1: "HF", 2: "HF DDP"}
AGREE = 1e-4  # relative difference of losses that is taken for the same arithmetic


def run_stage(args: argparse.Namespace, stage: str) -> dict[str, Any]:
    """Runs all contestants on one stage."""
    from moss_train.validate import validate
    from tools.bench.hf_baseline import comparable_config

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
        per_step = data.global_batch // data.read_together(1)
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
                "apart": relative(team.losses[: args.warmup], base.losses[: args.warmup]),
            }
        )
    return rows


def table(result: dict[str, Any]) -> str:
    """The rows as text."""
    rate = result["loader_samples_per_s"]
    rows = [
        ("layout", "ranks", "steps/s", "samples/s", "tokens/s", "padding", "frames/s",
         "peak GB (over imports)", "ours/HF (range)", "first loss")
    ]  # fmt: skip
    for row in result["rows"]:
        low, high = row["ratio_range"]
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f} ({low:.2f}-{high:.2f})"
        rows.append(
            (row["name"], str(row["ranks"]), f"{row['steps_per_s']:.2f}",
             f"{row['samples_per_s']:.1f}", f"{row['tokens_per_s']:.0f}", f"{row['padding']:.0%}",
             f"{row['frames_per_s']:.0f}", f"{row['peak_gb']:.2f} ({row['built_gb']:.2f})", ratio,
             f"{row['losses'][0]:.6f}")
        )  # fmt: skip
    apart = largest(row["apart"] for row in result["rows"])
    verdict = "agree" if apart <= AGREE else "DIFFER"
    return "\n".join(
        [
            f"stage {result['stage']} (the loader alone reads {rate:.0f} samples/s)",
            format_table(rows),
            f"losses of the warm-up steps {verdict}: {apart:.1e} relative (limit {AGREE:.0e})",
        ]
    )


def failed(results: list[dict[str, Any]]) -> bool:
    """Whether a layout computes something else than the baseline."""
    return any(not row["apart"] <= AGREE for result in results for row in result["rows"])


def main() -> int:
    """Prints a table for each stage; 1 if the two sides do not compute the same."""
    parser = CommandParser("python -m tools.bench.train", description=__doc__)
    add = parser.add_argument
    add("--stage", nargs="+", default=["pt1", "pt2"], choices=["pt1", "pt2"], help="stages")
    add("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS), help="our layouts")
    add("--model", default="toy", help="preset of conf/model")
    add("--micro-batch", type=int, default=8, help="samples of a microbatch of transformers")
    add("--data", default="toy_world", type=os.path.abspath, help="folder of the toy world")
    add("--steps", type=int, default=4, help="steps of a turn")
    add("--rounds", type=int, default=9, help="turns of each contestant")
    add("--warmup", type=int, default=3, help="steps before the first turn")
    add("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of both sides")
    add("--json", type=Path, help="file to write all numbers to")
    args = parser.parse_args()
    about = {"cpus": len(os.sched_getaffinity(0)), "torch": torch.__version__}
    about["load_before"] = round(os.getloadavg()[0], 2)
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    results = []
    for stage in args.stage:
        results.append(run_stage(args, stage))
        print(f"\n{table(results[-1])}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"about": about, "stages": results}, indent=1) + "\n")
    return int(failed(results))


if __name__ == "__main__":
    sys.exit(main())
