"""Measures how good `moss-data synthesize` is where the truth is known.

Clips of the toy world are given to it, and a server whose model errs at a known rate
(tools.bench.endpoint). Counted are the right samples that it keeps, of all right ones that the
model wrote, and the wrong ones among those that it keeps.
"""

from __future__ import annotations

import json
import random
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.commands import DONE, FAILED, CommandParser, finite_number, whole_number
from data_pipeline.synthesis.candidate import candidate_of, fault
from data_pipeline.synthesis.config import CutConfig
from data_pipeline.synthesis.cut import clips, find_sources
from data_pipeline.synthesis.store import REPLIES
from data_pipeline.toy.build import make_story
from data_pipeline.toy.render import mp4
from data_pipeline.toy.world import Story
from tools.bench.endpoint import ToyEndpoint
from tools.bench.teacher import Teacher, of_story, spoken
from tools.data.__main__ import main as moss_data

PROGRAM = "python -m tools.bench.synthesis"
PACE = 5  # words a second, as the toy world's streams have
KEPT, WRONG = 0.95, 0.01  # shares that must be reached


def stories(count: int, seed: int = 0) -> list[Story]:
    """As the streams of `realtime_sft`: 9 to 12 s, two or three events."""
    made = []
    for number in range(count):
        draws = random.Random(f"synthesis/{seed}/{number}")
        made.append(make_story("realtime_sft", draws.getrandbits(48), draws))
    return made


def render(folder: Path, clip_stories: Sequence[Story], size: int = 56, fps: int = 2) -> None:
    """Renders the clips with a clock in the picture, by which the model tells the seconds apart."""
    folder.mkdir(parents=True)
    for number, story in enumerate(clip_stories):
        (folder / f"{number:05d}.mp4").write_bytes(mp4(story, size, fps, clock=True))


def teacher(folder: Path, clip_stories: Sequence[Story], wrong: float, seed: int = 0) -> Teacher:
    """The model that knows the pictures of a folder of clips."""
    pictures: dict[str, tuple[int, int]] = {}
    for number, source in enumerate(find_sources(str(folder))):
        (clip,) = clips(source, Path(source.path).read_bytes(), CutConfig(), [])
        pictures |= {picture: (number, t) for t, picture in enumerate(clip.pictures)}
    return Teacher(clip_stories, pictures, wrong, seed)


@dataclass
class CandidateCounts:
    """Candidates that the model wrote, by what is true of them and what became of them.

    missed: right ones that were not kept, by the reason that was given.
    """

    right: int = 0
    wrong: int = 0
    kept_wrong: int = 0
    missed: Counter[str] = field(default_factory=Counter)

    @property
    def kept_right(self) -> int:
        return self.right - self.missed.total()

    @property
    def kept_share(self) -> float:
        """The share of the right candidates that were kept."""
        return self.kept_right / max(self.right, 1)

    @property
    def wrong_share(self) -> float:
        """The share of wrong candidates among those that were kept."""
        return self.kept_wrong / max(self.kept_right + self.kept_wrong, 1)

    def lines(self) -> list[str]:
        missed = ", ".join(f"{reason} {count}" for reason, count in self.missed.items())
        return [
            f"right samples kept: {self.kept_right} of {self.right} ({self.kept_share:.2%})"
            + (f"; missed: {missed}" if missed else ""),
            f"wrong samples kept: {self.kept_wrong} of {self.wrong}, "
            f"{self.wrong_share:.2%} of those that were kept",
        ]


def outcomes(out: Path) -> dict[str, dict[str, Any]]:
    """The outcomes of a folder's videos, by path."""
    with closing(sqlite3.connect(out / REPLIES)) as base:
        rows = base.execute("SELECT path, outcome FROM videos").fetchall()
    return {path: json.loads(outcome) for path, outcome in rows}


def judge(found: dict[str, dict[str, Any]], clip_stories: Sequence[Story]) -> CandidateCounts:
    """Holds candidates against the truth: the answers must be those of the world, and the
    conversation must be possible."""
    judged = CandidateCounts()
    for path, outcome in found.items():
        story = clip_stories[int(Path(path).stem)]
        for clip in outcome["clips"]:
            facts, seconds = of_story(story, clip["start"]), clip["end"] - clip["start"] + 1
            for one in clip["candidates"]:
                answers = {answer["second"]: answer["text"] for answer in one["answers"]}
                right = answers == spoken(facts, one["questions"], seconds)
                right &= fault(candidate_of(one["role"], one), seconds, PACE) is None
                judged.right += right
                judged.wrong += not right
                if right and one["fault"]:
                    judged.missed[one["fault"][0]] += 1
                judged.kept_wrong += not right and not one["fault"]
    return judged


def arguments(videos: Path, out: Path, url: str, *more: str) -> list[str]:
    """Arguments of `moss-data`, with the toy world's words a second and short pauses."""
    return [
        "synthesize", str(videos), str(out), "--url", url, "--model", "toy", "--pace", str(PACE),
        "--backoff", "0.02", "--timeout", "2", "--concurrency", "8", *more,
    ]  # fmt: skip


def synthesize(videos: Path, out: Path, url: str, *more: str) -> int:
    """Runs the command in this process; returns its exit code."""
    return moss_data(arguments(videos, out, url, *more))


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(PROGRAM, description=__doc__)
    add = parser.add_argument
    add("--clips", type=whole_number(above=0), default=100, metavar="N", help="of the toy world")
    add("--wrong", type=finite_number(least=0, below=1), default=0.1, help="share of replies with "
        "a wrong caption, time, answer or verdict")  # fmt: skip
    add("--failing", type=finite_number(least=0, below=1), default=0.05, help="share of requests "
        "that fail or get malformed replies")  # fmt: skip
    add("--lead", type=whole_number(above=0), default=3, help="votes by which a verdict leads")
    add("--seed", type=whole_number(least=0), default=0, help="of the clips and of the errors")
    options = parser.parse_args(argv)
    clip_stories = stories(options.clips, options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        videos, out = Path(temporary) / "videos", Path(temporary) / "out"
        render(videos, clip_stories)
        model = teacher(videos, clip_stories, options.wrong, options.seed)
        began = time.perf_counter()
        with ToyEndpoint(model, options.failing, hang=3.0) as server:
            code = synthesize(videos, out, server.url, "--lead", str(options.lead))
        seconds = time.perf_counter() - began
        judged = judge(outcomes(out), clip_stories)
    served = server.served
    print(f"{served.requests} requests in {seconds:.0f} s ({served.requests / seconds:.0f}/s), "
          f"failed: {served.requests - served.failures['']}")  # fmt: skip
    print("\n".join(judged.lines()))
    reached = judged.kept_share >= KEPT and judged.wrong_share <= WRONG
    return DONE if code == DONE and reached else FAILED


if __name__ == "__main__":
    sys.exit(main())
