"""Evaluates a checkpoint or an export: what it answers, captions, and says in time.

Each score stands beside that of the same model without its frames (blind) and that of chance.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from data_pipeline.commands import CommandParser, report_error, whole_number
from data_pipeline.schema import SampleError
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from moss_train import hardware
from moss_train.config import ConfigError
from moss_train.evaluate.exported import ExportedModel
from moss_train.evaluate.items import EvaluationError, read_lines
from moss_train.evaluate.model import TrainedModel
from moss_train.evaluate.suite import evaluate, table, toy_items
from moss_train.train.metrics import METRICS_FILE
from moss_train.train.report import write_report_or_warn


def main(arguments: list[str] | None = None) -> int:
    """Evaluates, prints the table, writes the JSON. 1 where that cannot be done."""
    parser = CommandParser("python -m tools.evaluate", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="RUN",
        help="run folder, checkpoint, or export")  # fmt: skip
    add("--suite", default="toy", metavar="SUITE",
        help="toy, a JSONL file of samples as in shards, or a suite of an export")  # fmt: skip
    add("--stages", nargs="*", default=[], metavar="STAGE",
        help="toy: stages whose samples are used (default: the run's own)")  # fmt: skip
    add("--data", type=Path, metavar="FOLDER",
        help="toy: folder of the toy world (default: data.root of the run)")  # fmt: skip
    add("--limit", type=whole_number(above=0), metavar="N",
        help="toy: maximum number of samples of each source (default: all)")  # fmt: skip
    add("--out", type=Path, metavar="FILE",
        help="JSON file of the scores (default: RUN/evaluation.json)")  # fmt: skip
    add("--device", default="auto", choices=hardware.KINDS, help="where the model runs")
    add(
        "--threads",
        type=whole_number(above=0),
        metavar="N",
        help="threads on the CPU (default: all cores)",
    )
    options = parser.parse_args(arguments)
    try:
        model = open_model(options.checkpoint, options.device, options.threads)
        if options.suite == "toy":
            items = toy_items(model, options.limit, options.stages, options.data)
        else:
            items = list(read_lines(Path(options.suite), model.encoder))
        result = evaluate(model, items, lambda line: print(line, file=sys.stderr, flush=True))
    except (EvaluationError, ConfigError, SampleError) as error:
        return report_error(parser.prog, error)
    print(table(result.scores))
    out = options.out or options.checkpoint / "evaluation.json"
    out.write_text(json.dumps(result.to_dict(), indent=1) + "\n")
    print(out)
    if out.parent == options.checkpoint and (options.checkpoint / METRICS_FILE).is_file():
        write_report_or_warn(options.checkpoint)  # the run's page shows its scores
    return 0


def open_model(checkpoint: Path, device: str, threads: int | None) -> TrainedModel:
    """A run, a checkpoint, or an export, which alone has a config.json at its top."""
    if not (checkpoint / "config.json").is_file():
        return TrainedModel.open(checkpoint, device, threads)
    load = MossVideoForConditionalGeneration.from_pretrained
    return ExportedModel.open_with(load, checkpoint, device, threads)
