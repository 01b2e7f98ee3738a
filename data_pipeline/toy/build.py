"""Builds the toy data set: shards of text, pictures and videos, and a tokenizer for them.

OUT/STAGE/{train,heldout}/{text,image,video}/ for each stage, OUT/tokenizer/, OUT/toy.json
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.atomic import write_atomically
from data_pipeline.fields import check_values, number
from data_pipeline.index import prepare_index
from data_pipeline.parent import end_with_parent
from data_pipeline.progress import Progress
from data_pipeline.schema import IMAGE_MARK, MARK, VIDEO_MARK
from data_pipeline.shards import ShardError, check_source, write_shards
from data_pipeline.tokens import build_toy_tokenizer
from data_pipeline.toy import captions, facts, render, stream, temporal, world

STAGES = ("pt1", "pt2", "sft", "realtime_sft")
MODALITIES = ("text", "image", "video")
# Pretraining: the share of image samples that are stories in pictures, and the pictures of each.
_STORIES = {"pt1": (0.4, 4), "pt2": (0.7, 5)}
# The share of clips whose questions only the order of their frames answers (temporal.py).
_TEMPORAL = {"pt1": 0.0, "pt2": 0.5, "sft": 0.8, "realtime_sft": 0.25}
_VERSION = 16  # changes with pictures and texts: folders of another version are refused


@dataclass(frozen=True)
class ToyConfig:
    """The arguments of a toy data set."""

    train: int = number(500, above=0)  # samples of each modality of each stage
    heldout: int = number(50, above=0)  # likewise
    seed: int = number(0)
    size: int = number(56, least=32)  # side of pictures and videos in pixels
    fps: int = number(2, least=2)
    samples_per_shard: int = number(500, above=0)
    vocab_size: int = number(512, above=0)
    stages: tuple[str, ...] = STAGES

    def __post_init__(self) -> None:
        check_values(self)
        if self.size % 2:
            raise ValueError(f"size: {self.size}: must be even, H.264 needs it")
        if not self.stages or not set(self.stages) <= set(STAGES):
            raise ValueError(f"stages: {self.stages}: choose of {', '.join(STAGES)}")


def build_toy(out_dir: str | Path, config: ToyConfig, workers: int = 2) -> dict[str, Any]:
    """Builds what is missing and returns the manifest, which is written last.

    A finished folder with the same arguments is left as it is. One with other arguments raises
    ShardError: it may be in use, and is not deleted.
    """
    out = Path(out_dir)
    arguments = {"version": _VERSION, **asdict(config), "stages": list(config.stages)}
    existing = _finished(out, arguments)
    if existing is not None:
        return existing
    started = time.perf_counter()
    counts = {"train": config.train, "heldout": config.heldout}
    texts: list[str] = []
    sizes: dict[str, Any] = {}
    sources = [
        f"{stage}/{split}/{modality}"
        for stage in config.stages
        for split in counts
        for modality in MODALITIES
    ]
    progress = Progress("toy data", sum(counts[source.split("/")[1]] for source in sources))
    with ProcessPoolExecutor(workers, None, end_with_parent, (os.getpid(),)) as pool:
        for source in sources:
            folder, split = out / source, source.split("/")[1]
            shutil.rmtree(folder, ignore_errors=True)  # left by a build that was killed
            make = partial(make_sample, source, config)
            samples = pool.map(make, range(counts[split]), chunksize=16)
            passed = _observe(samples, progress, texts if split == "train" else None)
            shards = write_shards(passed, folder, config.samples_per_shard)
            prepare_index(folder, workers)
            sizes[source] = {
                "samples": counts[split],
                "shards": len(shards),
                "bytes": sum(shard.stat().st_size for shard in shards),
            }
    progress.end()
    build_toy_tokenizer(out / "tokenizer", texts, config.vocab_size)
    manifest = {
        "config": arguments,
        "sources": sizes,
        "seconds": round(time.perf_counter() - started, 2),
    }
    write_atomically(out / "toy.json", json.dumps(manifest, indent=2) + "\n")
    return manifest


def _finished(out: Path, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a folder that was built with these arguments; None: it is not finished."""
    file = out / "toy.json"
    if not file.is_file():
        return None
    manifest: dict[str, Any] = json.loads(file.read_text())
    if manifest.get("config") != arguments:
        raise ShardError(
            f"{out} holds a toy world with other arguments ({manifest.get('config')}): "
            "remove it or choose another folder"
        )
    for source in manifest["sources"]:
        check_source(out / source)
    return manifest


def make_sample(source: str, config: ToyConfig, index: int) -> dict[str, Any]:
    """Sample `index` of a source (`sft/heldout/video`), determined by the arguments alone."""
    # `random` hashes a string seed the same way on every machine. The split is part of the seed:
    # held-out worlds are different worlds.
    rng = random.Random(f"{config.seed}/{source}/{index}")
    stage, split, modality = source.split("/")
    pretrain = stage.startswith("pt")
    seed = rng.getrandbits(48)
    key = {"__key__": f"{modality}-{index:06d}"}
    # Held-out samples of pretraining and one in five of training are captions alone.
    plain = split == "heldout" or rng.random() < 0.2
    if modality == "text":
        state, story = world.still(seed), world.simulate(seed, seconds=5, events=3)
        if pretrain:
            return key | {"json": _caption(*facts.of_text(state, story, rng))}
        text, questions = captions.ask_text(state, story, rng)
        return key | {"json": _answers(f"{text} ", questions, split)}
    if modality == "image":
        state = world.still(seed)
        if pretrain and split == "train" and rng.random() < _STORIES[stage][0]:
            return key | _interleaved(_STORIES[stage][1], seed, rng, config)
        if pretrain:
            text = captions.describe_places(state) if plain else facts.of_still(state, rng)
            data = _caption(IMAGE_MARK, text)
        else:
            data = _answers(IMAGE_MARK, captions.ask_still(state, rng), split)
        return key | {"json": data, "0.jpg": render.jpeg(state, config.size)}
    data, story = _clip(stage, split, seed, plain, rng)
    return key | {"json": data, "0.mp4": render.mp4(story, config.size, config.fps)}


def _clip(
    stage: str, split: str, seed: int, plain: bool, rng: random.Random
) -> tuple[dict[str, Any], world.Story]:
    """A clip's sample as JSON, and its story."""
    if rng.random() < _TEMPORAL[stage]:
        clip = temporal.draw(rng)
        if stage.startswith("pt"):
            return _caption(VIDEO_MARK, facts.tracks(clip.story, rng)), clip.story
        return _answers(VIDEO_MARK, list(clip.questions), split), clip.story
    story = make_story(stage, seed, rng)
    if stage == "sft":
        questions = captions.ask_end(story.states[-1], rng)
        return _answers(VIDEO_MARK, questions, split), story
    if stage == "realtime_sft":
        return _live(story, rng), story
    text = captions.narrate(story) if stage == "pt1" else captions.narrate_order(story)
    return _caption(VIDEO_MARK, text if plain else facts.of_story(story, rng)), story


def make_story(stage: str, seed: int, rng: random.Random) -> world.Story:
    """A stage's kind of story: one event (pt1), two events, or a stream that is often quiet."""
    if stage == "pt1":
        return world.simulate(seed, seconds=3, events=1)
    if stage == "realtime_sft":
        return world.simulate(seed, rng.randint(9, 12), rng.randint(2, 3), gap=2)
    return world.simulate(seed, seconds=4, events=2)


def _live(story: world.Story, rng: random.Random) -> dict[str, Any]:
    """The sample, as JSON, of a clip with a real-time conversation."""
    live = stream.question(story, rng) if rng.random() < 0.5 else stream.narration(story)
    data = {
        "messages": live.messages,
        "media": [{"type": "video", "file": "0.mp4"}],
        "kind": "realtime",
        "task": live.qa.task if live.qa else "narrate",
        # Pairs [second, sentence] that evaluation expects besides the answer to a question.
        "speech": [[second, text] for second, text in sorted(live.speech.items())],
    }
    return data | ({"options": list(live.qa.options)} if live.qa else {})


def _interleaved(pictures: int, seed: int, rng: random.Random, config: ToyConfig) -> dict[str, Any]:
    """A sample of several pictures of a story, each followed by what is new in it."""
    story = world.simulate(seed, pictures, events=rng.randint(2, pictures - 1))
    texts = [facts.still_facts(story.states[0], rng), *captions.narrate_changes(story)]
    data = _caption("", "".join(f"{IMAGE_MARK}{text}" for text in texts))
    pictures_by_name = {
        f"{i}.jpg": render.jpeg(state, config.size) for i, state in enumerate(story.states)
    }
    return {"json": data, **pictures_by_name}


def _caption(medium: str, text: str) -> dict[str, Any]:
    """A caption's sample as JSON; `medium`: mark of the picture or video, or a text."""
    return _talk([(medium, text)], "caption") | {"task": "caption"}


def _answers(mark: str, questions: list[captions.QA], split: str) -> dict[str, Any]:
    """A chat's sample as JSON: with all questions in training, held-out with the first alone."""
    first, *others = questions
    turns = [(mark + first.question, first.answer)]
    turns += [(qa.question, qa.answer) for qa in others if split == "train"]
    data = _talk(turns, "chat") | {"task": first.task}
    return data | ({"options": list(first.options)} if first.options else {})


def _talk(turns: list[tuple[str, str]], kind: str) -> dict[str, Any]:
    """A conversation as JSON; its n-th mark stands for `n.jpg` or `n.mp4`."""
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    marks = [mark[2:-2] for message in messages for mark in MARK.findall(message["content"])]
    suffixes = {"image": "jpg", "video": "mp4"}
    media = [{"type": of, "file": f"{i}.{suffixes[of]}"} for i, of in enumerate(marks)]
    return {"messages": messages, "media": media, "kind": kind}


def _observe(
    samples: Iterator[dict[str, Any]], progress: Progress, texts: list[str] | None
) -> Iterator[dict[str, Any]]:
    """Passes samples on: reports progress, and collects their contents in `texts`."""
    try:
        for sample in samples:
            if texts is not None:
                texts += [message["content"] for message in sample["json"]["messages"]]
            progress.step()
            yield sample
    except BrokenProcessPool:
        raise ShardError("a worker was killed (out of memory?): the same command begins anew, with "
                         "fewer --workers if need be") from None  # fmt: skip
