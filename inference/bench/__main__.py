"""Measures how fast the engine is on this machine.

    python -m inference.bench offline --model mid --random-weights --baseline hf
    python -m inference.bench stream --checkpoint DIR
    python -m inference.bench stream --model small --random-weights --endless 10000
    python -m inference.bench serve --model 11b --random-weights --sessions 16 --table

`offline`: a question about a whole video. `stream`: the same frames one by one, a question when
they have been seen. `serve`: many live sessions, all of which speak without end. `--baseline hf`
also runs the same model the way the published code does (see published.py); `--table` adds the
least time that this machine could need to each figure (see floor.py). Prints a table; writes
bench-MODE.json and bench-MODE.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from data_pipeline.imports import uncollected

with uncollected():
    import torch

    from data_pipeline import devices
    from data_pipeline.commands import DONE, CommandParser, finite_number, whole_number
    from inference.bench import measure
    from inference.bench.models import MODELS, random_model
    from inference.bench.modes import Bench
    from inference.bench.report import describe, print_table, write_report
    from inference.cli import one_line_errors
    from inference.engine.engine_config import KV_DTYPES, VISION_DTYPES
    from inference.engine.load import DTYPES, load_model
    from inference.engine.quantized_linear import KINDS as QUANTIZED
    from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration

PROGRAM = "python -m inference.bench"


def main() -> int:
    """Measures, prints the table, writes the report; returns the exit code."""
    arguments = parse()
    with one_line_errors(PROGRAM):
        torch.set_num_threads(arguments.threads or torch.get_num_threads())
        model = open_model(arguments)
        clock = measure.Clock(next(model.parameters()).device, arguments.clock)
        facts = describe(model, arguments)  # before quantization hides parameters
        rows, extra = Bench(model, arguments, clock).run()
        print_table(arguments.mode, rows, facts)
        write_report(Path(arguments.out), arguments.mode, rows, facts | extra)
    return DONE


def parse() -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = CommandParser(PROGRAM, description=__doc__)
    add, count = parser.add_argument, whole_number(above=0)
    add("mode", choices=("offline", "stream", "serve"))
    add("--model", choices=tuple(MODELS), default="mid", help="sizes of a model of random weights")
    add("--random-weights", action="store_true", help="measure the model of --model")
    add("--checkpoint", metavar="DIR", help="exported folder, in place of random weights")
    add("--baseline", choices=("hf",), help="measure the published way too (default: no)")
    add("--table", action="store_true", help="beside each figure the least that it could be here")
    add("--sessions", type=count, metavar="N",
        help="live ones (serve, default: 16); also decode in so many at once (stream)")  # fmt: skip
    add("--seconds", type=count, default=30, metavar="N", help="of live frames (serve)")
    add("--fps", type=finite_number(above=0), default=1.0, metavar="N",
        help="frames a second of each session (serve)")  # fmt: skip
    add("--frames", type=count, default=256, metavar="N", help="number of frames")
    add("--new-tokens", type=count, default=32, metavar="N", help="number of new tokens")
    add("--device", default="auto", help=devices.HELP)
    add("--dtype", choices=tuple(DTYPES), help="of weights (default: bf16 on CUDA, else fp32)")
    add("--quantize", choices=QUANTIZED, help="of the engine's weights only (default: no)")
    add("--kv-dtype", choices=KV_DTYPES, default="auto", help="of keys and values (default: auto)")
    add("--vision-dtype", choices=VISION_DTYPES, default="auto",
        help="of the vision tower's products (default: auto)")  # fmt: skip
    add("--compile", action="store_true", help="compile single-token steps (torch.compile)")
    add("--threads", type=count, metavar="N", help="threads of a CPU (default: torch's)")
    add("--clock", choices=("wall", "cpu"), default="wall",
        help="time: of the wall clock, or of this process on the CPU")  # fmt: skip
    add("--endless", type=whole_number(least=10), metavar="N",
        help="frames of a test whether memory and time stay flat (stream; default: no test)"
        )  # fmt: skip
    add("--window", type=count, metavar="N",
        help="frames in the ring (default: all of the test)")  # fmt: skip
    add("--out", default=".", metavar="DIR", help="folder of bench-MODE.json and bench-MODE.png")
    arguments = parser.parse_args()
    if not arguments.checkpoint and not arguments.random_weights:
        parser.error("give --checkpoint DIR, or --model with --random-weights")
    if arguments.mode == "serve" and (arguments.baseline or arguments.clock == "cpu"):
        parser.error("serve: live sessions are measured by the wall clock, without --baseline")
    if arguments.new_tokens < 3:
        parser.error(f"--new-tokens {arguments.new_tokens}: must be at least 3")
    return arguments


def open_model(arguments: argparse.Namespace) -> MossVideoForConditionalGeneration:
    """The model of the command line, not quantized, on its device."""
    device = devices.find(arguments.device, "--device")
    if arguments.checkpoint:
        return load_model(arguments.checkpoint, str(device), arguments.dtype)
    name = arguments.dtype or ("bf16" if devices.is_accelerator(device) else "fp32")
    return random_model(arguments.model, device, DTYPES[name])


if __name__ == "__main__":
    raise SystemExit(main())
