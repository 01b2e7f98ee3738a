"""Answers a question about a whole video or a picture, or one without either.

python -m inference.offline_infer --checkpoint DIR --video_path clip.mp4 --prompt ...
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: imports start at the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_pipeline.imports import uncollected

with uncollected():
    from torch import Tensor

    from data_pipeline.commands import CommandParser, finite_number, report_error, whole_number
    from data_pipeline.prompts import Prompt, PromptForm, as_system, as_typed
    from data_pipeline.schema import IMAGE_MARK, VIDEO_MARK, Message
    from inference import cli
    from inference.present import Sink, present
    from inference.session.answer import LARGE_CHUNK_FRAMES, check_fits
    from inference.session.events import Event
    from inference.session.handle import SessionHandle
    from inference.session.response import Vocabulary
    from inference.session.runner import Runner
    from inference.sources import CLIP_FPS, CLIP_MAX_FRAMES, CLIP_MIN_FRAMES, clip, picture

PROGRAM = "python -m inference.offline_infer"


def parser(program: str, doc: str, max_frames: int) -> argparse.ArgumentParser:
    """The flags of both offline commands; `max_frames`: of a video, by default."""
    made = CommandParser(program, description=doc)
    cli.add_engine_flags(made)
    cli.flag(made, "video_path", metavar="FILE", help="video file")
    cli.flag(made, "image_path", metavar="FILE", help="picture file")
    cli.flag(made, "prompt", metavar="TEXT",
             help="question (default: Describe the video. or Describe the image.)")  # fmt: skip
    cli.flag(made, "system_prompt", default="", metavar="TEXT", help="system prompt")
    cli.flag(made, "video_fps", type=finite_number(above=0), default=CLIP_FPS, metavar="N",
             help="frames per second of the video that are looked at")  # fmt: skip
    made.add_argument("--fps", dest="video_fps", type=finite_number(above=0), metavar="N",
                      default=argparse.SUPPRESS, help="same as --video_fps")  # fmt: skip
    cli.flag(made, "video_minlen", type=whole_number(above=0), metavar="N",
             help=f"minimum number of frames of a video (default: {CLIP_MIN_FRAMES})")  # fmt: skip
    cli.flag(made, "video_maxlen", type=whole_number(above=0), metavar="N",
             help=f"maximum number of frames of a video (default: {max_frames}; --window, if that "
             "is less)")  # fmt: skip
    cli.add_output_flags(made)
    cli.add_sampling_flags(made)
    return made


def media(args: argparse.Namespace, max_frames: int) -> tuple[str, list[Tensor]]:
    """The kind of medium (`video`, `image` or empty), and its frames. max_frames: as `parser`'s."""
    if args.video_path and args.image_path:
        raise cli.CommandError("--video_path and --image_path: give one of them")
    if args.video_path:
        most = args.video_maxlen or max(1, min(max_frames, args.window))
        least = args.video_minlen or min(CLIP_MIN_FRAMES, most)
        if least > most:
            raise cli.CommandError(
                f"--video_minlen {least}: must not be more than --video_maxlen ({most})"
            )
        return "video", clip(args.video_path, args.video_fps, least, most)
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
    text = mark + as_typed(args.prompt or f"Describe the {kind}.")
    system = as_system(args.system_prompt)
    messages = [Message("system", system)] if system else []
    counts = [frames] if kind else []
    return vocabulary.prompts.question([*messages, Message("user", text)], counts, form)


def show(program: str, answer: SessionHandle, jsonl: str | None) -> int:
    """Prints the answer as it comes; the exit code."""

    def conclude(newest: Mapping[str, Event]) -> None:
        if "error" in newest:
            report_error(program, newest["error"].data["message"])
        elif "response.done" in newest:
            _note_speed(newest["response.done"].data, newest["session.metrics"].data)

    return present(answer, answer.events(), jsonl, _print, conclude)


def _print(event: Event) -> None:
    if event.type == "response.output_text.delta":
        print(event.data["delta"], end="", flush=True)
    elif event.type == "response.done":
        print(flush=True)


def _note_speed(done: dict[str, Any], stats: dict[str, Any]) -> None:
    usage = done["usage"]
    words = f"{usage['output_tokens']} tokens"
    if "ttft_ms" in stats:
        words += f", the first after {stats['ttft_ms']['p50']:.0f} ms"
    if "tokens_per_second" in usage:
        words += f", then {usage['tokens_per_second']:.1f} a second"
    cli.note(f"{words}; {done['reason']}")
    frames, tokens = stats["evicted_frame"], stats["evicted_text"]
    if frames or tokens:
        cli.note(f"forgotten (--window, --max_context): the first {frames} frames, {tokens} tokens")


def main(argv: Sequence[str] | None = None) -> int:
    args = parser(PROGRAM, __doc__, max_frames=CLIP_MAX_FRAMES).parse_args(argv)
    with cli.one_line_errors(PROGRAM):
        Sink.check(args.jsonl)
        sampling = cli.sampling(args)
        info = cli.require_use(args, watching=False)
        kind, frames = media(args, CLIP_MAX_FRAMES)
        with Runner(cli.load(args)) as runner:
            prompt = question(runner.vocabulary, args, kind, len(frames), info.question_form)
            check_fits(runner.engine, prompt.tokens, frames)
            options = {"sampling": sampling, "max_new_tokens": args.max_new_tokens}
            with runner.answer(
                prompt.tokens, frames, chunk=LARGE_CHUNK_FRAMES, **options
            ) as answer:
                return show(PROGRAM, answer, args.jsonl)


if __name__ == "__main__":
    raise SystemExit(main())
