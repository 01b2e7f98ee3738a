"""Asks a real-time model about a whole video or a picture, without a clock.

A video is watched the way the model has learned to watch, in silence, one frame a second, and as
fast as the machine can; then it is asked. A picture is part of the question, as in its training.

    python -m inference.realtime_offline_infer --checkpoint DIR --video_path clip.mp4 --prompt ...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file: imports start at the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_pipeline.imports import uncollected

with uncollected():
    from inference import cli
    from inference.offline_infer import media, parser, question, show
    from inference.present import Sink
    from inference.session.answer import LARGE_CHUNK_FRAMES
    from inference.session.runner import Runner
    from inference.sources import WATCHED_MAX_FRAMES

PROGRAM = "python -m inference.realtime_offline_infer"


def main(argv: Sequence[str] | None = None) -> int:
    args = parser(PROGRAM, __doc__, max_frames=WATCHED_MAX_FRAMES).parse_args(argv)
    with cli.one_line_errors(PROGRAM):
        Sink.check(args.jsonl)
        sampling = cli.sampling(args)
        info = cli.require_use(args, watching=True)
        kind, frames = media(args, WATCHED_MAX_FRAMES)
        with Runner(cli.load(args)) as runner:
            vocabulary = runner.vocabulary
            if kind == "video":
                text = args.prompt or "Describe the video."
                prompts = vocabulary.prompts
                tokens = prompts.watched(len(frames), text, args.system_prompt)
            else:
                tokens = question(vocabulary, args, kind, len(frames), info.question_form).tokens
            options = {"sampling": sampling, "max_new_tokens": args.max_new_tokens}
            with runner.answer(tokens, frames, chunk=LARGE_CHUNK_FRAMES, **options) as answer:
                return show(PROGRAM, answer, args.jsonl)


if __name__ == "__main__":
    raise SystemExit(main())
