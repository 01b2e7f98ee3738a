"""How fast the engine is on this machine.

    python -m inference.bench offline --model mid --random-weights --baseline hf
    python -m inference.bench stream --checkpoint DIR
    python -m inference.bench stream --model small --random-weights --endless 10000

`offline`: a question about a whole video. `stream`: the same frames one by one, a question when
they have been seen. With `--baseline hf` the same model is run the published way too (see
published.py). Prints a table; writes bench-MODE.json and bench-MODE.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from data_pipeline import devices
from data_pipeline.commands import DONE, CommandParser
from inference.bench import measure
from inference.bench.models import MODELS, random_model
from inference.bench.published import PublishedModel
from inference.bench.report import Row, describe, print_table, write_report
from inference.cli import positive_int
from inference.engine.engine import Engine, EngineConfig
from inference.engine.load import DTYPES, load_model
from inference.engine.quantize import FORMATS
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration


def main() -> int:
    """Measures, prints the table, writes the report; the exit code."""
    arguments = parse()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    model = open_model(arguments)
    clock = measure.Clock(next(model.parameters()).device, arguments.clock)
    facts = describe(model, arguments)  # before quantization hides parameters
    rows, extra = (offline if arguments.mode == "offline" else stream)(model, arguments, clock)
    print_table(arguments.mode, rows, facts)
    write_report(Path(arguments.out), arguments.mode, rows, facts | extra)
    return DONE


def parse() -> argparse.Namespace:
    """Command line."""
    parser = CommandParser("python -m inference.bench", description=__doc__)
    add = parser.add_argument
    add("mode", choices=("offline", "stream"))
    add("--model", choices=tuple(MODELS), default="mid", help="sizes of a model of random weights")
    add("--random-weights", action="store_true", help="measure the model of --model")
    add("--checkpoint", metavar="DIR", help="exported folder, in place of random weights")
    add("--baseline", choices=("hf",), help="measure the published way too (default: no)")
    add("--frames", type=positive_int, default=256, metavar="N", help="number of frames")
    add("--new-tokens", type=positive_int, default=32, metavar="N", help="number of new tokens")
    add("--device", default="auto", help=devices.HELP)
    add("--dtype", choices=tuple(DTYPES), help="of weights (default: bf16 on CUDA, else fp32)")
    add("--quantize", choices=tuple(FORMATS), help="of the engine's weights only (default: no)")
    add("--compile", action="store_true", help="compile single-token steps (torch.compile)")
    add("--threads", type=positive_int, metavar="N", help="threads of a CPU (default: torch's)")
    add("--clock", choices=("wall", "cpu"), default="wall",
        help="time: of the wall clock, or of this process on the CPU")  # fmt: skip
    add("--endless", type=int, default=0, metavar="N",
        help="frames of a test whether memory stays flat (stream); 0: no such test")  # fmt: skip
    add("--window", type=positive_int, metavar="N",
        help="frames in the ring (default: all of the test)")  # fmt: skip
    add("--out", default=".", metavar="DIR", help="folder of bench-MODE.json and bench-MODE.png")
    arguments = parser.parse_args()
    if not arguments.checkpoint and not arguments.random_weights:
        parser.error("give --checkpoint DIR, or --model with --random-weights")
    if arguments.new_tokens < 3:
        parser.error(f"--new-tokens {arguments.new_tokens}: must be at least 3")
    return arguments


def open_model(arguments: argparse.Namespace) -> MossVideoForConditionalGeneration:
    """The model in full weights, on its device."""
    device = devices.find(arguments.device, "--device")
    if arguments.checkpoint:
        return load_model(arguments.checkpoint, str(device), arguments.dtype)
    name = arguments.dtype or ("bf16" if devices.is_accelerator(device) else "fp32")
    return random_model(arguments.model, device, DTYPES[name])


def make_engine(
    model: MossVideoForConditionalGeneration, arguments: argparse.Namespace, window: int
) -> tuple[Engine, list[Row]]:
    """The engine, quantized if asked (after the baseline has run, for the layers change), and by
    how much that moved the logits."""
    rows = []
    if arguments.quantize:
        moved = measure.quantize(model, arguments.quantize)
        rows = [Row("logits moved (relative norm)", "", moved, None)]
    tokens = 2 * arguments.frames + 1024
    return Engine(model, window=window, max_tokens=tokens, compile=arguments.compile), rows


Result = tuple[list[Row], dict[str, object]]


def offline(
    model: MossVideoForConditionalGeneration,
    arguments: argparse.Namespace,
    clock: measure.Clock,
) -> Result:
    """A question about a whole video."""
    ours, theirs, common = compare(model, arguments, clock, arguments.frames, measure.offline)
    rows = [
        _row("vision, all frames", "s", "vision", ours, theirs),
        _row("time to first token", "s", "first_token", ours, theirs),
        _row("published total", "s", "published_total", ours, theirs),
    ]
    return [*rows, *common], {}


def stream(
    model: MossVideoForConditionalGeneration,
    arguments: argparse.Namespace,
    clock: measure.Clock,
) -> Result:
    """Frames one by one, then questions. The published way computes the whole prompt again."""
    if arguments.endless:
        return endless(model, arguments, clock)
    window = arguments.window or arguments.frames
    ours, theirs, common = compare(model, arguments, clock, window, measure.stream)
    question, frame = measure.median_ms(ours.question), measure.median_ms(ours.frames)
    whole = None if theirs is None else 1e3 * theirs.first_token
    rows = [
        Row("question -> first token", "ms", question, whole),
        Row("frame -> decision", "ms", frame, None),
        Row("frame -> decision, p99", "ms", measure.p99_ms(ours.frames), None),
    ]
    return [*rows, *common], {}


def endless(
    model: MossVideoForConditionalGeneration,
    arguments: argparse.Namespace,
    clock: measure.Clock,
) -> Result:
    """Whether memory stays flat."""
    engine, _ = make_engine(model, arguments, arguments.window or EngineConfig.window)
    result = measure.endless(engine, arguments.endless, clock)
    rows = [
        Row(f"memory after {result.frames // 10} frames", "MB", result.megabytes[0], None),
        Row(f"memory after {result.frames} frames", "MB", result.megabytes[-1], None),
        Row("rate", "frames/s", result.rate, None, True),
    ]
    return rows, {"endless": vars(result)}


def compare(
    model: MossVideoForConditionalGeneration,
    arguments: argparse.Namespace,
    clock: measure.Clock,
    window: int,
    run: Callable[[Engine, torch.Tensor, int, measure.Clock], measure.Timings],
) -> tuple[measure.Timings, measure.Timings | None, list[Row]]:
    """The engine's timings, the published way's, and the rows that every mode has."""
    pixels = measure.random_frames(model, arguments.frames)
    theirs = baseline(model, arguments, pixels, clock)
    engine, moved = make_engine(model, arguments, window)
    run(engine, pixels[:2], 4, clock)  # warms up, captures graphs
    ours = run(engine, pixels, arguments.new_tokens, clock)
    decode = _row("decode", "tokens/s", "tokens_per_second", ours, theirs, True)
    return ours, theirs, [decode, memory_row(engine, theirs is not None), *moved]


def baseline(
    model: MossVideoForConditionalGeneration,
    arguments: argparse.Namespace,
    pixels: torch.Tensor,
    clock: measure.Clock,
) -> measure.Timings | None:
    """The same model run the published way."""
    if arguments.baseline is None:
        return None
    print("running the published way ...", flush=True)
    published = PublishedModel(model)
    measure.published(published, pixels[:2], 3, clock)
    return measure.published(published, pixels, arguments.new_tokens, clock)


def _row(
    name: str,
    unit: str,
    field: str,
    ours: measure.Timings,
    theirs: measure.Timings | None,
    more_is_better: bool = False,
) -> Row:
    other = None if theirs is None else getattr(theirs, field)
    return Row(name, unit, getattr(ours, field), other, more_is_better)


def memory_row(engine: Engine, compared: bool) -> Row:
    """Keys and values of a frame: theirs are repeated to all heads."""
    frame = engine.cache.frames[..., : engine.cache.patches, :]  # [layers, 2, slots, ...]
    megabytes = frame.numel() * frame.element_size() / engine.max_sessions / 1e6
    text = engine.config.text_config
    repeated = megabytes * text.num_attention_heads / text.num_key_value_heads
    return Row("keys and values of a frame", "MB", megabytes, repeated if compared else None)


if __name__ == "__main__":
    raise SystemExit(main())
