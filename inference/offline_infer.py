"""Answers a question about a whole video or a picture, or one without either.

python -m inference.offline_infer --checkpoint DIR --video_path clip.mp4 --prompt ...
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a file: the folder of the package, not this one
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from torch import Tensor

from data_pipeline.commands import CommandParser
from data_pipeline.prompts import Prompt, PromptForm
from data_pipeline.schema import IMAGE_MARK, VIDEO_MARK, Message
from inference import cli
from inference.session.handle import SessionHandle
from inference.session.response import Vocabulary
from inference.session.runner import Runner
from inference.sources import clip, picture


def parser(program: str, doc: str, most: int) -> argparse.ArgumentParser:
    """The flags of both offline commands; `most`: frames of a video by default."""
    made = CommandParser(program, description=doc)
    cli.add_engine_flags(made)
    cli.flag(made, "video_path", help="a video file")
    cli.flag(made, "image_path", help="a picture file")
    cli.flag(made, "prompt", help="(default: Describe the video. (or image))")
    cli.flag(made, "system_prompt", default="")
    cli.flag(made, "video_fps", type=float, default=1.0, help="frames a second")
    made.add_argument("--fps", dest="video_fps", type=float, default=argparse.SUPPRESS)
    cli.flag(made, "video_minlen", type=int, default=8, help="least frames")
    cli.flag(made, "video_maxlen", type=int, default=most, help="most frames")
    cli.flag(made, "max_new_tokens", type=int, default=512, help="tokens of the answer")
    cli.flag(made, "jsonl", help="write every event to this file; -: to the terminal instead")
    cli.add_sampling_flags(made)
    return made


def media(args: argparse.Namespace) -> tuple[str, list[Tensor]]:
    """The kind of what is asked about (video, image or nothing), and its frames."""
    if args.video_path and args.image_path:
        raise cli.CommandError("--video_path and --image_path: give one of them")
    if args.video_path:
        if args.video_fps <= 0 or not 0 < args.video_minlen <= args.video_maxlen:
            raise cli.CommandError(
                "--video_fps must be more than 0, --video_minlen from 1 to --video_maxlen"
            )
        frames = clip(args.video_path, args.video_fps, args.video_minlen, args.video_maxlen)
        return "video", frames
    if args.image_path:
        return "image", [picture(args.image_path)]
    if not args.prompt:
        raise cli.CommandError("give --video_path, --image_path or --prompt")
    return "", []


def question(
    vocabulary: Vocabulary, args: argparse.Namespace, kind: str, frames: int, form: PromptForm
) -> Prompt:
    """The tokens before the answer."""
    mark = {"video": VIDEO_MARK, "image": IMAGE_MARK, "": ""}[kind]
    text = mark + (args.prompt or f"Describe the {kind}.")
    messages = [Message("system", args.system_prompt)] if args.system_prompt else []
    counts = [frames] if kind else []
    return vocabulary.prompts.question([*messages, Message("user", text)], counts, form)


def show(answer: SessionHandle, jsonl: str | None) -> int:
    """Prints the answer as it comes; the exit code: 1 where there was an error."""
    sink = cli.Sink(jsonl)
    failed = False
    for event in answer.events():
        sink.show(event)
        if event.type == "response.output_text.delta" and not sink.terminal:
            print(event.data["delta"], end="", flush=True)
        elif event.type == "response.done":
            if not sink.terminal:
                print(flush=True)
            _note_speed(event.data, answer.stats())
        elif event.type == "error":
            failed = True
            cli.note(f"error: {event.data['message']}")
    sink.close()
    return int(failed)


def _note_speed(done: dict[str, Any], stats: dict[str, Any]) -> None:
    usage = done["usage"]
    words = f"{usage['output_tokens']} tokens, the first after {stats['ttft_ms']['p50']:.0f} ms"
    if "tokens_per_second" in usage:
        words += f", then {usage['tokens_per_second']:.1f} a second"
    cli.note(f"{words}; {done['reason']}")


def main(argv: Sequence[str] | None = None) -> int:
    command = parser("python -m inference.offline_infer", __doc__, most=16)
    args = command.parse_args(argv)
    with cli.one_line_errors(command.prog):
        stage = cli.check_stage(args.checkpoint, realtime=False)
        kind, frames = media(args)
        engine = cli.load(args)
        with Runner(engine) as runner:
            form: PromptForm = "pretrain" if stage in ("pt1", "pt2") else "chat"
            prompt = question(runner.vocabulary, args, kind, len(frames), form)
            options = {"sampling": cli.sampling(args), "max_new_tokens": args.max_new_tokens}
            with runner.answer(prompt.tokens, frames, chunk=32, **options) as answer:
                return show(answer, args.jsonl)


if __name__ == "__main__":
    raise SystemExit(main())
