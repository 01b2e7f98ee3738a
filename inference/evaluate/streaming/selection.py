"""Selects benchmarks by name, and the items that a configuration asks for."""

from __future__ import annotations

import hashlib
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
from inference.evaluate.streaming.templates import Templates, read_templates
from inference.evaluate.streaming.timing import Timing

# Where a benchmark is given as a folder: its files of questions in there.
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
class Selection:
    """A benchmark and its items."""

    benchmark: Benchmark
    items: list[Item]
    templates: Templates  # the templates of its questions
    files: dict[str, str]  # path of each file of questions -> digest of its content
    rows: tuple[str, ...]  # all rows of these files, also those that are not asked


def select(config: StreamingConfig) -> list[Selection]:
    """The benchmarks of a configuration. Raises FormError for a file that cannot be read."""
    own = Path(config.prompts) if config.prompts else None
    timing = Timing(config.context or None, config.patience)
    selections, rows, known = list[Selection](), dict[str, None](), set[tuple[str, str]]()
    for named in config.benchmarks:
        name, _, path = named.partition("=")
        if name not in BENCHMARKS or not path:
            raise FormError(f"{named}: expected NAME=PATH, NAME one of {', '.join(BENCHMARKS)}")
        files = _files(name, Path(path))
        templates = read_templates(files[0], own)
        benchmark = _benchmark(name, templates, timing, config)
        videos = Path(config.videos) if config.videos else None
        items = [
            item
            for file in files
            for item in benchmark.read(file, file.parent if videos is None else videos)
        ]
        _refuse_twice(name, path, items, known)
        if not items:
            raise FormError(f"{path}: has no questions")
        digests = {str(file): hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files}
        own_rows = dict.fromkeys(item.row for item in items)
        selected = _selected(items, config)
        selections.append(Selection(benchmark, selected, templates, digests, tuple(own_rows)))
        rows |= own_rows
    if not any(selection.items for selection in selections):
        named = ", ".join(config.tasks)
        raise FormError(f"tasks {named}: are part of no row's name: {', '.join(rows)}")
    _check_biases(config, selections)
    return selections


def _refuse_twice(name: str, path: str, items: list[Item], known: set[tuple[str, str]]) -> None:
    """Raises FormError for an id that two items of a benchmark share: answers are kept by id.

    known: benchmark and id of the items of earlier files; the ids of these are added.
    """
    twice = [key for key, count in Counter(item.id for item in items).items() if count > 1]
    if twice:
        raise FormError(f"{path}: several items are called {twice[0]}")
    again = [item.id for item in items if (name, item.id) in known]
    if again:
        why = f"an item of another file of {name} is called {again[0]}, too"
        raise FormError(f"{path}: {why}: give this file an --out of its own")
    known |= {(name, item.id) for item in items}


def _check_biases(config: StreamingConfig, selections: list[Selection]) -> None:
    if config.biases and not any(
        isinstance(selection.benchmark, Events) for selection in selections
    ):
        raise FormError("biases: need events, of which the operating curve is: give events=FILE")
    written = [f"{bias:g}" for bias in config.biases]
    if len(set(written)) < len(written):
        raise FormError(f"biases: {', '.join(written)}: one stands there twice")


def _benchmark(
    name: str, templates: Templates, timing: Timing, config: StreamingConfig
) -> Benchmark:
    if name == "ovobench":
        return OvoBench(templates, timing)
    if name == "streamingbench":
        return StreamingBench(templates, timing)
    if name == "omnimmi":
        return OmniMMI(templates, timing)
    if name == "proactivevideoqa":
        return ProactiveVideoQA()
    return Events(config.within, 1 / config.speaking.fps)


def _files(name: str, path: Path) -> list[Path]:
    """The files of questions of a benchmark that is given as a file or folder."""
    if not path.is_dir():
        return [path]
    files = [path / file for file in _FILES[name] if (path / file).is_file()]
    if not files:
        raise FormError(f"{path}: has none of {', '.join(_FILES[name])}")
    return files


def _selected(items: list[Item], config: StreamingConfig) -> list[Item]:
    """The items of the configured tasks, at most `limit` of each row."""
    counts: Counter[str] = Counter()
    selected = []
    for item in items:
        if config.tasks and not any(task in item.row for task in config.tasks):
            continue
        counts[item.row] += 1
        if config.limit is None or counts[item.row] <= config.limit:
            selected.append(item)
    return selected
