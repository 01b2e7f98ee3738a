"""Evaluates a checkpoint or an export: what it answers, captions, and says in time.

Each score stands beside that of chance and, with --controls, those of the same model without
frames (blind), with one frame in place of all (one_frame), with frames in another order (shuffled).

Under torchrun the samples are shared out; --tensor and --pipeline split a model over ranks:

    torchrun --nproc-per-node 8 -m tools.evaluate --checkpoint RUN --suite toy --tensor 4
"""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

from data_pipeline.commands import CommandParser, report_error, whole_number
from data_pipeline.ranks import RanksError
from data_pipeline.schema import SampleError
from data_pipeline.shards import ShardError
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from moss_train import hardware
from moss_train.config import ConfigError
from moss_train.data_config import CONTROLS
from moss_train.evaluate.exported import ExportedModel
from moss_train.evaluate.items import EvaluationError, Item, suite_samples
from moss_train.evaluate.model import TrainedModel
from moss_train.evaluate.suite import Evaluation, evaluate, table, toy_items
from moss_train.train.metrics import METRICS_FILE
from moss_train.train.report import write_report_or_warn


def main(arguments: list[str] | None = None) -> int:
    """Evaluates, prints the table, writes the JSON; returns 1 where that cannot be done."""
    parser = CommandParser("python -m tools.evaluate", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="RUN",
        help="run folder, checkpoint, or export")  # fmt: skip
    add("--suite", default="toy", metavar="SUITE",
        help="toy, a JSONL file of samples as in shards, a folder of shards, or a suite of an "
        "export")  # fmt: skip
    add("--controls", nargs="*", default=["blind"], choices=CONTROLS, metavar="CONTROL",
        help=f"what is shown in place of the frames beside them: {', '.join(CONTROLS)} "
        "(default: blind)")  # fmt: skip
    add("--stages", nargs="*", default=[], metavar="STAGE",
        help="toy: stages whose samples are used (default: the run's own)")  # fmt: skip
    add("--data", type=Path, metavar="FOLDER",
        help="toy: folder of the toy world (default: data.root of the run)")  # fmt: skip
    add("--limit", type=whole_number(above=0), metavar="N",
        help="maximum number of samples of each source (default: all)")  # fmt: skip
    add("--out", type=Path, metavar="FILE",
        help="JSON file of the scores (default: RUN/evaluation.json)")  # fmt: skip
    add("--device", default="auto", choices=hardware.KINDS, help="where the model runs")
    add("--threads", type=whole_number(above=0), metavar="N",
        help="threads on the CPU (default: all cores)")  # fmt: skip
    add("--tensor", type=whole_number(above=0), default=1, metavar="N",
        help="ranks over which each layer of a checkpoint is split (default: 1)")  # fmt: skip
    add("--pipeline", type=whole_number(above=0), default=1, metavar="N",
        help="ranks over which the layers of a checkpoint are shared out (default: 1)")  # fmt: skip
    options = parser.parse_args(arguments)
    options.out = options.out or options.checkpoint / "evaluation.json"
    try:
        if options.checkpoint.exists() and not os.access(options.out.parent, os.W_OK):
            raise EvaluationError(f"{options.out}: cannot be written")  # better now than in hours
        with open_model(options) as model:
            items = suite_items(model, options)
            result = evaluate(model, items, report_progress, options.controls)
            first = model.groups.world.rank() == 0
    except (EvaluationError, ConfigError, SampleError, ShardError, RanksError) as error:
        return report_error(parser.prog, error)
    return write(result, options) if first else 0


def report_progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def suite_items(model: TrainedModel, options: Namespace) -> Iterable[Item]:
    """The samples of the suite."""
    path = Path(options.suite)
    if options.suite == "toy":
        return toy_items(model, options.limit, options.stages, options.data)
    return suite_samples(path, path.stem, model.encoder, options.limit)


def write(result: Evaluation, options: Namespace) -> int:
    """Prints the table and what was left out; writes the JSON."""
    print(table(result.scores))
    out = options.out
    out.write_text(json.dumps(result.to_dict(), indent=1) + "\n")
    print(out)
    for left in result.left_out:
        report_progress(f"left out: {left}")
    if out.parent == options.checkpoint and (options.checkpoint / METRICS_FILE).is_file():
        write_report_or_warn(options.checkpoint)  # the run's page shows its scores
    return 0


def open_model(options: Namespace) -> TrainedModel:
    """Opens a run, a checkpoint, or an export, which alone has a config.json at its top."""
    checkpoint, device, threads = options.checkpoint, options.device, options.threads
    layout = {"tensor": options.tensor, "pipeline": options.pipeline}
    if not (checkpoint / "config.json").is_file():
        return TrainedModel.open(checkpoint, device, threads, **layout)
    if layout != {"tensor": 1, "pipeline": 1}:
        raise EvaluationError(f"{checkpoint}: --tensor and --pipeline are for checkpoints of runs")
    load = MossVideoForConditionalGeneration.from_pretrained
    return ExportedModel.open_with(load, checkpoint, device, threads)
