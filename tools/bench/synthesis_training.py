"""Trains on what `moss-data synthesize` makes of clips, and on the truth about the same clips.

Both runs start from the shipped toy model after `sft`, and differ in the real-time samples alone:
written and checked by a model that errs at a known rate, or taken from the world. Both are
evaluated on the truth about other clips. FOLDER keeps all; what is finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.atomic import write_atomically
from data_pipeline.commands import DONE, FAILED, CommandParser, finite_number, whole_number
from data_pipeline.synthesis.candidate import candidate_of, fault
from data_pipeline.synthesis.config import ROLES, SynthesisConfig, WriteConfig
from data_pipeline.synthesis.cut import find_sources
from data_pipeline.synthesis.write import SHARDS, write
from data_pipeline.tables import format_table
from data_pipeline.toy.build import ToyConfig, build_toy
from data_pipeline.toy.captions import describe, tell
from data_pipeline.toy.world import Story
from tools.bench.endpoint import ToyEndpoint
from tools.bench.synthesis import PACE, render, stories, synthesize, teacher
from tools.bench.teacher import Teacher
from tools.demo.__main__ import run_all
from tools.demo.parts import BATCH, LIVE, Part

PROGRAM = "python -m tools.bench.synthesis_training"
CLOSE = 0.03  # of the decision F1
METRICS = ("decision F1", "events spoken within 1 s", "  with the right words",
         "false alarms a minute")  # fmt: skip


def truth(folder: Path, out: Path, clip_stories: Sequence[Story]) -> None:
    """Yields samples of all roles about a folder of clips, unchecked, from a model that never
    errs."""
    model, found = Teacher(clip_stories, {}, 0.0), {}
    for source, story in zip(find_sources(str(folder)), clip_stories, strict=True):
        seconds = len(story.states)
        timeline = {
            "scenes": [{"second": 0, "text": describe(story.states[0])}],
            "events": [{"second": e.second, "text": tell(e)} for e in story.events],
        }
        candidates: list[dict[str, Any]] = []
        for role in ROLES:
            data = {"role": role, "number": 1, "seconds": seconds, **timeline}
            for one in model.reply("write", data, (), "0")["samples"]:
                wrong = fault(candidate_of(role, one), seconds, PACE)
                candidates.append({"role": role, **one, "fault": wrong})
        clip = {"start": 0, "end": seconds - 1, "fault": None, "timeline": timeline,
                "candidates": candidates}  # fmt: skip
        found[source.path] = {"sha256": source.path, "fault": None, "clips": [clip]}
    out.mkdir(parents=True, exist_ok=True)
    config = SynthesisConfig(write=WriteConfig(pace=PACE))
    write(out, find_sources(str(folder)), lambda source: found.get(source.path), config)


def world(out: Path, base: Path, made: Path, heldout: Path) -> Path:
    """Makes a toy world with the pictures and texts of `base`, and other clips."""
    if out.exists():
        return out
    partial = out.with_name(f".{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(base, partial)
    for split, shards in (("train", made), ("heldout", heldout)):
        shutil.rmtree(partial / LIVE / split / "video")
        shutil.copytree(shards / SHARDS, partial / LIVE / split / "video")
    return partial.rename(out)


def data(folder: Path, args: argparse.Namespace) -> None:
    """Makes the clips, their synthesized samples, their true samples, and a toy world with each."""
    clip_stories, other = stories(args.clips), stories(args.heldout, seed=1)
    for name, those in (("clips", clip_stories), ("heldout", other)):
        if not (folder / name).exists():
            render(folder / f".{name}", those)
            (folder / f".{name}").rename(folder / name)
    truth(folder / "clips", folder / "truth", clip_stories)
    truth(folder / "heldout", folder / "truth-heldout", other)
    model = teacher(folder / "clips", clip_stories, args.wrong)
    with ToyEndpoint(model, args.failing, hang=3.0) as server:
        synthesize(folder / "clips", folder / "made", server.url)
    build_toy(folder / "world", ToyConfig(train=args.world, heldout=20, stages=(LIVE,)))
    for name in ("made", "truth"):
        world(folder / f"world-{name}", folder / "world", folder / name, folder / "truth-heldout")


def parts(folder: Path, steps: int, ranks: int) -> list[Part]:
    """The commands that train and evaluate, as a user would type them."""
    shipped, start = folder / "shipped", folder / "start"
    todo = [
        Part("unpack the weights", "tools.demo.checkpoint", ("unpack", str(shipped)), 1),
        Part("import them", "tools.convert_checkpoint",
             ("hf-to-megatron", str(shipped), str(start)), 5, makes=start),
    ]  # fmt: skip
    for name in ("made", "truth"):
        run = folder / f"run-{name}"
        fields = [
            f"stage={LIVE}", "model=toy", "data=toy", "hardware=cpu", "hardware.threads=1",
            f"data.root={folder / f'world-{name}'}", f"run.dir={run}",
            f"init_from={start}", f"data.tokenizer={start}/tokenizer",
            f"data.global_batch={BATCH}", f"data.micro_batch={BATCH // ranks}",
            f"data.samples={steps * BATCH}", "trainer.console_every=50",
        ]  # fmt: skip
        todo.append(Part(f"train on {name}", "moss_train", tuple(fields), steps / 4, ranks))
        suite = ["--checkpoint", str(run), "--suite", "toy", "--stages", LIVE]
        suite += ["--data", str(folder / f"world-{name}"), "--threads", str(ranks)]
        todo.append(Part(f"evaluate {name}", "tools.evaluate", tuple(suite), 20))
    return todo


def scores(run: Path) -> dict[str, float]:
    """The scores of a run's streams."""
    found = json.loads((run / "evaluation.json").read_text())["scores"]
    return {one["metric"]: one["value"] for one in found if one["source"].endswith("video")}


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser(PROGRAM, description=__doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="folder of everything")
    add("--clips", type=whole_number(above=0), default=100, metavar="N", help="to train on")
    add("--heldout", type=whole_number(above=0), default=20, metavar="N", help="to evaluate on")
    add("--world", type=whole_number(above=0), default=1_500, metavar="N",
        help="pictures and texts of the toy world beside the clips")  # fmt: skip
    add("--steps", type=whole_number(above=0), default=350, help=f"of {BATCH} samples")
    add("--ranks", type=whole_number(above=0), default=2, help="processes that train")
    add("--wrong", type=finite_number(least=0, below=1), default=0.1, help="share of wrong replies")
    add("--failing", type=finite_number(least=0, below=1), default=0.05, help="share of requests "
        "that fail")  # fmt: skip
    args = parser.parse_args(arguments)
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    data(folder, args)
    run_all(parts(folder, args.steps, args.ranks), folder / "parts.json")
    made, true = scores(folder / "run-made"), scores(folder / "run-truth")
    rows = [["score", "made", "truth"]]
    rows += [[name.strip(), f"{made[name]:.3f}", f"{true[name]:.3f}"] for name in METRICS]
    print(format_table(rows))
    write_atomically(folder / "scores.json", json.dumps({"made": made, "truth": true}, indent=1))
    return DONE if true[METRICS[0]] - made[METRICS[0]] <= CLOSE else FAILED


if __name__ == "__main__":
    sys.exit(main())
