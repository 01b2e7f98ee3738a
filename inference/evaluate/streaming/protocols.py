"""Shows an item to a speaker: as a stream with its questions, or as clips it is asked about."""

from __future__ import annotations

from operator import itemgetter

from inference.evaluate.streaming.items import (
    EARLIER_ANSWER,
    Benchmark,
    Item,
    Reply,
    TimedPrompt,
    Watched,
)
from inference.evaluate.streaming.source import open_source
from inference.evaluate.streaming.speaker import Speaker, Watching


def watch(speaker: Speaker, item: Item, fps: float) -> Watched:
    """Runs push mode: shows the item frame by frame, and returns what the speaker says meanwhile.

    A question is a turn of its own, right before the first frame at or after its second; one
    beyond the end comes after the last frame. The last question before the first frame is given
    together with that frame: there is nothing to say before it. Raises SampleError for a video
    that cannot be read, and what the speaker raises.
    """
    with open_source(item.video) as source:
        prompts = sorted(((source.second(p.second), p) for p in item.prompts), key=itemgetter(0))
        with speaker.watch(item) as watching:
            frame_count, second = 0, item.start
            for second, picture in source.stream(item.start, item.end, fps):
                due = [prompt for prompt in prompts if prompt[0] <= second]
                del prompts[: len(due)]
                with_frame = due.pop() if due and not frame_count else None
                for at, prompt in due:
                    watching.ask(at, _text(prompt, watching))
                first = None if with_frame is None else _text(with_frame[1], watching)
                watching.frame(second, picture, first)
                frame_count += 1
            for _, prompt in prompts:
                watching.ask(second, _text(prompt, watching))
            return Watched(tuple(watching.end()), frame_count / fps)


def _text(prompt: TimedPrompt, watching: Watching) -> str:
    """A question's text, with the model's answer to an earlier question where it refers to one."""
    if prompt.answer_to is None:
        return prompt.text
    turn = prompt.answer_to + 1
    answer = next((e.text for e in watching.emissions() if e.turn == turn), "")
    return prompt.text.replace(EARLIER_ANSWER, answer)


def poll(
    speaker: Speaker, benchmark: Benchmark, item: Item, fps: float, max_frames: int
) -> list[Reply]:
    """Runs the benchmark's official protocol, which asks about clips. Raises what `watch` does."""
    with open_source(item.video) as source:

        def ask(start: float, end: float | None, question: str) -> Reply:
            at = source.duration if end is None else min(end, source.duration)
            frames = source.clip(start, end, fps, max_frames)
            answer = speaker.answer(item, question, frames, at if end is None else end)
            return Reply(start, at if end is None else end, question, answer)

        return benchmark.poll(item, ask)
