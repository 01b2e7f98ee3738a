"""Benchmarks by name, and the items that are wanted of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from inference.evaluate.streaming.config import StreamingConfig
from inference.evaluate.streaming.events import Events
from inference.evaluate.streaming.forms import FormError
from inference.evaluate.streaming.items import Benchmark, Item
from inference.evaluate.streaming.omnimmi import FILES as OMNIMMI_FILES
from inference.evaluate.streaming.omnimmi import OmniMMI
from inference.evaluate.streaming.ovobench import OvoBench
from inference.evaluate.streaming.proactivevideoqa import ProactiveVideoQA
from inference.evaluate.streaming.streamingbench import StreamingBench
from inference.evaluate.streaming.timing import Timing
from inference.evaluate.streaming.words import Words, read_words

# Files of a folder that is given in place of one of them.
_FILES = {
    "ovobench": ("ovo_bench_new.json", "data/ovo_bench_new.json"),
    "streamingbench": tuple(
        f"{folder}questions_{part}.json"
        for folder in ("", "src/data/")
        for part in ("real", "omni", "sqa", "proactive")
    ),
    "omnimmi": tuple(f"{name}.json" for name in OMNIMMI_FILES),
    "proactivevideoqa": (
        "anno.json",
        *(f"{part}/anno.json" for part in ("EGO", "TV", "VAD", "WEB")),
    ),
    "events": ("events.json",),
}
BENCHMARKS = tuple(_FILES)


@dataclass(frozen=True)
class Chosen:
    """A benchmark, its items, the words in which it asks."""

    benchmark: Benchmark
    items: list[Item]
    words: Words


def choose(config: StreamingConfig) -> list[Chosen]:
    """The benchmarks of a configuration; FormError for what cannot be read."""
    own = Path(config.prompts) if config.prompts else None
    timing = Timing(config.context or None, config.patience)
    chosen = []
    for named in config.benchmarks:
        name, _, path = named.partition("=")
        if name not in BENCHMARKS or not path:
            raise FormError(f"{named}: expected NAME=PATH, NAME one of {', '.join(BENCHMARKS)}")
        files = _files(name, Path(path))
        words = read_words(files[0], own)
        benchmark = _benchmark(name, words, timing, config)
        videos = Path(config.videos) if config.videos else None
        items = [
            item
            for file in files
            for item in benchmark.read(file, file.parent if videos is None else videos)
        ]
        twice = [key for key, count in Counter(item.id for item in items).items() if count > 1]
        if twice:
            raise FormError(f"{path}: several items are called {twice[0]}")
        chosen.append(Chosen(benchmark, _wanted(items, config), words))
    return chosen


def _benchmark(name: str, words: Words, timing: Timing, config: StreamingConfig) -> Benchmark:
    if name == "ovobench":
        return OvoBench(words, timing)
    if name == "streamingbench":
        return StreamingBench(words, timing)
    if name == "omnimmi":
        return OmniMMI(words, timing)
    if name == "proactivevideoqa":
        return ProactiveVideoQA()
    return Events(config.within, 1 / config.speaking.fps)


def _files(name: str, path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = [path / file for file in _FILES[name] if (path / file).is_file()]
    if not files:
        raise FormError(f"{path}: has none of {', '.join(_FILES[name])}")
    return files


def _wanted(items: list[Item], config: StreamingConfig) -> list[Item]:
    counts: Counter[str] = Counter()
    wanted = []
    for item in items:
        if config.tasks and not any(task in item.row for task in config.tasks):
            continue
        counts[item.row] += 1
        if config.limit is None or counts[item.row] <= config.limit:
            wanted.append(item)
    return wanted
