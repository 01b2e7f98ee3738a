"""Asks a real-time model about a whole video or a picture, without a clock.

A video is watched the way the model has learned to watch, in silence, one frame a second, and as
fast as the machine goes; then it is asked. A picture stands in the question, as in its training.

    python -m inference.realtime_offline_infer --checkpoint DIR --video_path clip.mp4 --prompt ...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file: imports start at the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from inference import cli
from inference.offline_infer import CHUNK, media, parser, question, show
from inference.session.response import Vocabulary
from inference.session.runner import Runner

PROGRAM = "python -m inference.realtime_offline_infer"


def watched(vocabulary: Vocabulary, system_prompt: str, frames: int, prompt: str) -> list[int]:
    """The transcript of a stream on which nothing was said before the prompt."""
    special = vocabulary.special
    tokens = [special.begin_of_text]
    if system_prompt:
        tokens += vocabulary.prompts.turn("system", system_prompt)
    tokens += vocabulary.user_turn("")
    tokens += [special.image, special.silence] * frames
    return [*tokens, special.eot_id, *vocabulary.user_turn(prompt)]


def main(argv: Sequence[str] | None = None) -> int:
    args = parser(PROGRAM, __doc__, max_frames=256).parse_args(argv)
    with cli.one_line_errors(PROGRAM):
        sampling = cli.sampling(args)
        info = cli.require_use(args, watching=True)
        kind, frames = media(args)
        with Runner(cli.load(args)) as runner:
            vocabulary = runner.vocabulary
            if kind == "video":
                asked = args.prompt or "Describe the video."
                tokens = watched(vocabulary, args.system_prompt, len(frames), asked)
            else:
                tokens = question(vocabulary, args, kind, len(frames), info.question_form).tokens
            options = {"sampling": sampling, "max_new_tokens": args.max_new_tokens}
            with runner.answer(tokens, frames, chunk=CHUNK, **options) as answer:
                return show(PROGRAM, answer, args.jsonl)


if __name__ == "__main__":
    raise SystemExit(main())
