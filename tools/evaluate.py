"""python -m tools.evaluate --checkpoint RUN|EXPORT --suite toy|FILE.jsonl [--out scores.json]

What a trained model answers, captions and says in time, against itself without its frames (blind)
and against chance. FILE.jsonl holds a sample a line, as in shards, with `options` where a question
has them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from data_pipeline.commands import report_error
from data_pipeline.schema import SampleError
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from moss_train.config import ConfigError
from moss_train.evaluate.exported import ExportedModel
from moss_train.evaluate.items import EvaluationError, read_lines
from moss_train.evaluate.model import TrainedModel
from moss_train.evaluate.suite import evaluate, table, toy_items


def main(arguments: list[str] | None = None) -> int:
    """Evaluates, prints the table, writes the JSON. 1 where that cannot be done."""
    first, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m tools.evaluate", usage=first, description=rest)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="run folder, checkpoint or export"
    )
    parser.add_argument("--suite", default="toy", help="toy, or a JSONL file")
    parser.add_argument("--stages", nargs="*", default=[], help="toy: of which stages; its own")
    parser.add_argument("--data", type=Path, help="toy: the folder; as in training")
    parser.add_argument("--limit", type=int, help="toy: samples of each source at most")
    parser.add_argument("--out", type=Path, help="JSON; RUN/evaluation.json")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="CPU threads; all")
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
    return 0


def open_model(checkpoint: Path, device: str, threads: int | None) -> TrainedModel:
    """A run, a checkpoint, or an export, which alone has a config.json at its top."""
    if not (checkpoint / "config.json").is_file():
        return TrainedModel.open(checkpoint, device, threads)
    load = MossVideoForConditionalGeneration.from_pretrained
    return ExportedModel.open_with(load, checkpoint, device, threads)


if __name__ == "__main__":
    sys.exit(main())
