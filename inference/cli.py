"""What the commands share: flags, loading, one line for what is wrong."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

from data_pipeline.commands import STOPPED, WRONG_USAGE, report_error
from data_pipeline.schema import SampleError
from inference.engine.engine import Engine, EngineFull
from inference.engine.load import RankFinished, load_engine
from inference.engine.sampling import Sampling
from inference.session.events import Event
from inference.session.handle import SessionClosed
from inference.sources import SourceError

STAGE_KEY = "moss_stage"
REALTIME = "realtime_sft"


class CommandError(Exception):
    """What is wrong with a command, in one line."""


class Sink:
    """Where `--jsonl` goes: a file, `-` for stdout, or nowhere."""

    def __init__(self, name: str | None) -> None:
        self.terminal = name == "-"
        self._out: TextIO | None = None
        if name:
            self._out = sys.stdout if self.terminal else open(name, "w")  # noqa: SIM115

    def show(self, event: Event) -> None:
        """Writes an event as a line of JSON."""
        if self._out:
            print(json.dumps(event.as_dict(), ensure_ascii=False), file=self._out, flush=True)

    def close(self) -> None:
        if self._out and not self.terminal:
            self._out.close()


def flag(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    """Adds a flag that may be spelled with `_`, as published, or with `-`."""
    names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    parser.add_argument(*names, dest=name, **options)


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of load_engine."""
    flag(parser, "checkpoint", default=os.environ.get("CHECKPOINT"),
         help="folder of the model in Hugging Face's format (or $CHECKPOINT)")  # fmt: skip
    flag(parser, "device", default="auto", help="auto, cpu, cuda, cuda:1")
    flag(parser, "dtype", choices=["fp32", "bf16"], help="(default: the checkpoint's)")
    flag(parser, "window", type=int, default=256, help="frames in the ring")
    flag(parser, "sinks", type=int, default=0, help="first frames that never leave it")
    flag(parser, "max_context", type=int, default=8192, help="text tokens kept")
    flag(parser, "quantize", choices=["int8", "fp8"], help="weights of the linear layers")
    flag(parser, "compile", action="store_true", help="torch.compile")


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of Sampling; the defaults are greedy."""
    flag(parser, "temperature", type=float, default=0.0, help="0: the likeliest token")
    flag(parser, "top_k", type=int, default=0, help="0: all tokens")
    flag(parser, "top_p", type=float, default=1.0)
    flag(parser, "repetition_penalty", type=float, default=1.0)
    flag(parser, "silence_bias", type=float, default=0.0,
         help="added to the logit of <|silence|>: more than 0 makes the model quieter")  # fmt: skip
    flag(parser, "seed", type=int, default=0)


def sampling(args: argparse.Namespace) -> Sampling:
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "silence_bias", "seed")
    return Sampling(**{name: getattr(args, name) for name in names})


def stage(checkpoint: str | Path | None) -> str | None:
    """The stage whose export this is; None: it does not say. CommandError: it is no checkpoint."""
    if not checkpoint:
        raise CommandError("--checkpoint: give the folder of a model")
    config = Path(checkpoint) / "config.json"
    if not config.is_file():
        raise CommandError(f"--checkpoint {checkpoint}: there is no {config}")
    try:
        found = json.loads(config.read_text())
        return found.get(STAGE_KEY)
    except (ValueError, AttributeError) as error:
        raise CommandError(f"--checkpoint: {config} is no JSON object: {error}") from None


def check_stage(checkpoint: str | Path | None, *, realtime: bool) -> str | None:
    """The stage; refuses, before anything is loaded, a model that was trained for the other use."""
    found = stage(checkpoint)
    if found is None:
        words = "a real-time one" if realtime else "one for offline questions"
        note(f"{checkpoint}/config.json has no {STAGE_KEY}: taking the model to be {words}")
    elif realtime and found != REALTIME:
        raise CommandError(
            f"{checkpoint} is of the stage {found}: it has not learned when to be silent, and "
            f"would talk on and on; give a {REALTIME} model, or use inference.offline_infer"
        )
    elif not realtime and found == REALTIME:
        raise CommandError(
            f"{checkpoint} is of the stage {REALTIME}: it ends what it says with <|silence|> and "
            "waits for frames; use inference.realtime_offline_infer or realtime_streaming_infer"
        )
    return found


def load(args: argparse.Namespace, max_sessions: int = 1) -> Engine:
    """The engine of the flags."""
    note(f"loading {args.checkpoint}")
    engine = load_engine(
        args.checkpoint,
        device=args.device,
        dtype=args.dtype,
        window=args.window,
        sinks=args.sinks,
        max_tokens=args.max_context,
        max_sessions=max_sessions,
        quantize=args.quantize,
        compile=args.compile,
    )
    note(f"ready on {engine.device}, {str(engine.dtype).removeprefix('torch.')}")
    return engine


def note(text: str) -> None:
    """A word to the person at the terminal; results go to stdout."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Ends the command `program` with a line for what its user can mend, with exit code 2."""
    try:
        yield
    except RankFinished:
        raise SystemExit(0) from None
    except (CommandError, SourceError, SampleError, SessionClosed, EngineFull) as error:
        _end(program, error)
    except (ValueError, OSError) as error:
        if os.environ.get("MOSS_TRACEBACK"):
            raise
        _end(program, f"{error} (MOSS_TRACEBACK=1 shows where)")
    except KeyboardInterrupt:
        note("\ninterrupted")
        raise SystemExit(STOPPED) from None


def _end(program: str, error: object) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        report_error(program, " ".join(str(error).split()))
    raise SystemExit(WRONG_USAGE)
