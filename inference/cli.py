"""What the inference commands share: flags, the use that a model is for, loading, errors."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, NoReturn

import torch

from data_pipeline import devices
from data_pipeline.cgroups import cores
from data_pipeline.commands import (
    DONE,
    FAILED,
    STOPPED,
    WRONG_USAGE,
    describe,
    report_error,
    whole_number,
)
from data_pipeline.ranks import JoinError, RanksError
from data_pipeline.schema import SampleError
from data_pipeline.signal_handlers import handling
from inference.engine.choose_attend import CHOICES
from inference.engine.engine import Engine, EngineFull
from inference.engine.engine_config import KV_DTYPES, VISION_DTYPES, EngineConfig
from inference.engine.load import DTYPES, RankFinished, load_engine
from inference.engine.quantized_linear import KINDS as QUANTIZED
from inference.engine.sampling import Sampling
from inference.export_info import FORM_KEY, ExportError, ExportInfo, read_export_info
from inference.kernels.choose import KINDS
from inference.live import SourceError
from inference.session.handle import SessionClosed

MAX_NEW_TOKENS = 512  # of an answer or a response, where a command does not say
_SAMPLING_HELP = {
    "temperature": "temperature of sampling; 0: the most likely token",
    "top_k": "sample from so many of the most likely tokens only; 0: from all",
    "top_p": "sample from the most likely tokens that together have this probability only",
    "min_p": "sample from tokens at least this probable only, as a share of the most likely one's "
    "probability",
    "repetition_penalty": "factor by which the logits of tokens in the context are lowered",
    "presence_penalty": "subtracted from the logits of tokens that were said before",
    "frequency_penalty": "subtracted from a token's logit as often as it was said before",
    "silence_bias": "added to the logit of <|silence|>; above 0 the model speaks less",
    "seed": "seed of sampling (default: a new one each time)",
}


class CommandError(Exception):
    """Wrong usage of a command; the message names the flag."""


def flag(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    """Adds a flag that may be spelled with `_`, as published, or with `-`."""
    names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    parser.add_argument(*names, dest=name, **options)


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of load_engine."""
    default = EngineConfig()
    flag(parser, "checkpoint", default=os.environ.get("CHECKPOINT"), metavar="DIR",
         help="folder of the model in Hugging Face's format (default: $CHECKPOINT)")  # fmt: skip
    flag(parser, "device", default="auto", help=devices.HELP)
    flag(parser, "dtype", choices=list(DTYPES),
         help="dtype of weights (default: the checkpoint's on CUDA, fp32 on a CPU)")  # fmt: skip
    flag(parser, "window", type=int, default=default.window, metavar="N",
         help="maximum number of frames that the model sees at once")  # fmt: skip
    flag(parser, "sinks", type=int, default=default.sinks, metavar="N",
         help="number of first frames that are never replaced")  # fmt: skip
    flag(parser, "max_context", type=int, default=default.max_tokens, metavar="N",
         help="maximum number of cached tokens of a session")  # fmt: skip
    flag(parser, "quantize", choices=QUANTIZED,
         help="quantize the decoder's linear layers (default: no)")  # fmt: skip
    kept = "dtype of cached keys and values; auto: the weights'; fp8: a byte each"
    flag(parser, "kv_dtype", choices=KV_DTYPES, default="auto", help=f"{kept} (default: auto)")
    tower = "dtype of the vision tower's products; auto: the weights'; fp8: untried on a GPU"
    flag(parser, "vision_dtype", choices=VISION_DTYPES, default="auto",
         help=f"{tower} (default: auto)")  # fmt: skip
    flag(parser, "compile", action="store_true", help="compile single-token steps (torch.compile)")
    kinds = "attention of prompts and of the vision tower"
    flag(parser, "attention", choices=CHOICES, default="auto",
         help=f"{kinds}; auto: npu on an Ascend NPU, else sdpa (default: auto)")  # fmt: skip
    kernels = "what decoding steps are made of; auto: Triton kernels where they prove right on CUDA"
    flag(parser, "kernels", choices=KINDS, default="auto", help=f"{kernels} (default: auto)")


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of Sampling."""
    for entry in fields(Sampling):
        if entry.name not in _SAMPLING_HELP:
            continue
        kind = int if entry.default is None else type(entry.default)
        flag(parser, entry.name, type=kind, default=entry.default, metavar="X",
             help=_SAMPLING_HELP[entry.name])  # fmt: skip


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """How much is said, and where the events go."""
    flag(parser, "max_new_tokens", type=whole_number(above=0), default=MAX_NEW_TOKENS, metavar="N",
         help="maximum number of new tokens of an answer")  # fmt: skip
    flag(parser, "jsonl", metavar="FILE",
         help="write every event to FILE; -: to the terminal, in place of the text")  # fmt: skip


def sampling(args: argparse.Namespace) -> Sampling:
    """CommandError where a value is out of range. A seed that is drawn is told."""
    with refusing_values():
        made = Sampling(**{name: getattr(args, name) for name in _SAMPLING_HELP})
    if args.seed is None and made.temperature > 0:
        note(f"--seed {made.seed} draws the same again")
    return made


def export_info(args: argparse.Namespace) -> ExportInfo:
    """What the model of `--checkpoint` is for; CommandError: it is not a checkpoint."""
    if not args.checkpoint:
        raise CommandError("--checkpoint: give the folder of a model")
    try:
        return read_export_info(args.checkpoint)
    except ExportError as error:
        raise CommandError(f"--checkpoint {error}") from None


def require_use(args: argparse.Namespace, *, watching: bool) -> ExportInfo:
    """Refuses, before anything is loaded, a model that was trained for the other use."""
    info, checkpoint = export_info(args), args.checkpoint
    if info.watches is None:
        use = "real-time streams" if watching else "offline questions"
        note(f"{checkpoint}/config.json has no {FORM_KEY}: the model is taken to be for {use}")
    elif watching and not info.watches:
        raise CommandError(
            f"--checkpoint {checkpoint}: its prompts are of the form {info.prompt_form}: it has "
            "not learned when to be silent; use inference.offline_infer, or give a real-time model"
        )
    elif not watching and info.watches:
        raise CommandError(
            f"--checkpoint {checkpoint}: its prompts are of the form {info.prompt_form}: it ends "
            "what it says with <|silence|> and waits for frames; use "
            "inference.realtime_offline_infer or inference.realtime_streaming_infer"
        )
    return info


def load(args: argparse.Namespace, max_sessions: int = 1) -> Engine:
    """The engine of the flags."""
    with refusing_values():
        config = EngineConfig(
            window=args.window,
            sinks=args.sinks,
            max_tokens=args.max_context,
            max_sessions=max_sessions,
            compile=args.compile,
            attention=args.attention,
            kv_dtype=args.kv_dtype,
            vision_dtype=args.vision_dtype,
            kernels=args.kernels,
        )
    note(f"loading {args.checkpoint}")
    torch.set_num_threads(min(torch.get_num_threads(), cores()))  # a quota slows each of too many
    engine = load_engine(
        args.checkpoint, config, device=args.device, dtype=args.dtype, quantize=args.quantize
    )
    keep_for_life()
    note(f"ready on {engine.device}, {str(engine.dtype).removeprefix('torch.')}")
    return engine


def keep_for_life() -> None:
    """What is there by now, libraries and model, lives as long as the process: Python's collector
    need not look at it, neither between two steps nor when the process ends (seconds)."""
    gc.collect()
    gc.freeze()


def leads() -> bool:
    """Whether this is rank 0, which alone reads sources and speaks."""
    return os.environ.get("RANK", "0") == "0"


def note(text: str) -> None:
    """A word to the person at the terminal; results go to stdout."""
    if leads():
        with contextlib.suppress(OSError):  # the terminal was closed
            print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def refusing_values() -> Iterator[None]:
    """Turns a config's refusal of a flag's value into wrong usage."""
    try:
        yield
    except ValueError as error:
        raise CommandError(str(error)) from None


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Ends the command `program` with one line for what its user can mend, and an exit code.

    SIGTERM does what Ctrl-C does, unless what runs inside takes both itself.
    """
    try:
        with handling([signal.SIGTERM], signal.default_int_handler):
            yield
    except RankFinished:
        raise SystemExit(DONE) from None
    except CommandError as error:
        _end(program, error, WRONG_USAGE)
    except RanksError as error:
        _end_alone(program, error, WRONG_USAGE)
    except JoinError as error:
        _end_alone(program, error, FAILED)
    except (SourceError, SampleError, SessionClosed, EngineFull) as error:
        _end(program, error, FAILED)
    except (ValueError, OSError) as error:
        if os.environ.get("MOSS_TRACEBACK"):
            raise
        words = describe(error) if isinstance(error, OSError) else error
        _end(program, f"{words} (MOSS_TRACEBACK=1 shows where)", FAILED)
    except KeyboardInterrupt:
        note("\ninterrupted")
        raise SystemExit(STOPPED) from None


def _end(program: str, error: object, code: int) -> NoReturn:
    if leads():
        report_error(program, " ".join(str(error).split()))
    raise SystemExit(code)


def _end_alone(program: str, error: object, code: int) -> NoReturn:
    """As `_end`, on any rank: it may be the only one that has started."""
    raise SystemExit(report_error(program, error, code))
