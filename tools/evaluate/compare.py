"""Compares evaluations, each with the first: differences with their intervals, and a page of the
items that changed, with their media and the answers side by side.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipeline.atomic import write_atomically
from data_pipeline.commands import CommandParser, report_error, whole_number
from data_pipeline.images import decode_image
from data_pipeline.page import picture_url, render
from data_pipeline.schema import SampleError
from data_pipeline.tables import format_table
from data_pipeline.video import open_video
from inference.evaluate.compare import Bootstrap, Difference, changed, compare, not_compared
from inference.evaluate.results import (
    BenchmarkError,
    Item,
    Results,
    markdown,
    number,
    read_items,
    read_results,
)

PROGRAM = "python -m tools.evaluate compare"
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
_THUMB, _MEDIA = 200, 3  # pixels; media of an item that are shown
HEAD = ["", "n", "first", "second", "difference", "from", "to", "gained", "lost", "p", "not shared"]


@dataclass(frozen=True)
class Run:
    """An evaluation's folder, read."""

    name: str
    results: Results
    items: dict[str, dict[str, Item]]

    @property
    def views(self) -> frozenset[str]:
        """Rows that look at the items of another one."""
        return frozenset(row.row for row in self.results.rows if row.view)


@dataclass(frozen=True)
class ChangedItem:
    """An item of the page. pictures: URLs and what is below them."""

    title: str
    question: str
    reference: str
    pictures: Sequence[tuple[str, str]]
    notes: Sequence[str]  # about media that cannot be shown
    answers: Sequence[tuple[str, str, str]]  # run, score, answer


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables; writes compare.json, .md and .html."""
    parser = CommandParser(PROGRAM, description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="--out of an evaluation; two or more")
    add("--out", type=Path, default=Path("compare"), metavar="FOLDER", help="folder of the page")
    add("--show", type=whole_number(least=0), default=20, metavar="N",
        help="maximum number of changed items of a row on the page")  # fmt: skip
    add("--seed", type=whole_number(least=0), default=Bootstrap.seed, metavar="N",
        help="of the bootstrap")  # fmt: skip
    add("--resamples", type=whole_number(above=0), default=Bootstrap.resamples, metavar="N",
        help="number of draws of the bootstrap")  # fmt: skip
    options = parser.parse_args(arguments)
    if len(options.runs) < 2:
        parser.error("give two runs or more")
    try:
        runs = open_runs(options.runs)
        bootstrap = Bootstrap(options.seed, options.resamples)
        found = [
            compare(runs[0].items, run.items, bootstrap, runs[0].views | run.views)
            for run in runs[1:]
        ]
    except BenchmarkError as error:
        return report_error(parser.prog, error)
    for run, rows in zip(runs[1:], found, strict=True):
        print(f"{runs[0].name} -> {run.name}")
        print(format_table(cells(rows), "lr", rule=True), end="\n\n")
        for words in lacking(runs[0], run):
            print(words, file=sys.stderr)
    print(write(options.out, runs, found, options.show))
    return 0


def open_runs(folders: Sequence[Path]) -> list[Run]:
    """Opens runs. Raises BenchmarkError where one is not an evaluation, or their suites differ."""
    runs = [Run(str(folder), read_results(folder), read_items(folder)) for folder in folders]
    for run in runs[1:]:
        if run.results.suite != runs[0].results.suite:
            raise BenchmarkError(
                f"{run.name} is of suite {run.results.suite}, {runs[0].name} of"
                f" {runs[0].results.suite}: compare runs of one suite"
            )
    return runs


def lacking(first: Run, second: Run) -> list[str]:
    """A line with the rows that are not compared; none where all are."""
    rows = not_compared(first.items, second.items)
    return [f"not compared, for the runs share no item: {', '.join(rows)}"] if rows else []


def cells(rows: Sequence[Difference]) -> list[list[str]]:
    """The cells of a table, the header first."""
    return [HEAD, *map(_cells, rows)]


def _cells(row: Difference) -> list[str]:
    values = (row.first, row.second, row.difference, row.low, row.high)
    tested = ["" if value is None else str(value) for value in (row.gained, row.lost)]
    p = "" if row.p is None else f"{row.p:.2g}"
    return [
        row.row, str(row.count), *map(number, values), *tested, p,
        f"{row.only_first} + {row.only_second}" if row.only_first or row.only_second else "",
    ]  # fmt: skip


def write(out: Path, runs: Sequence[Run], found: Sequence[list[Difference]], show: int) -> Path:
    """Writes compare.json, compare.md and the page; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    names = [run.name for run in runs]
    data = {
        "runs": names,
        "differences": [
            {"first": names[0], "second": name, "rows": [asdict(row) for row in rows]}
            for name, rows in zip(names[1:], found, strict=True)
        ],
    }
    write_atomically(out / "compare.json", json.dumps(data, indent=1) + "\n")
    tables = [
        (f"{names[0]} -> {run.name}", cells(rows), lacking(runs[0], run))
        for run, rows in zip(runs[1:], found, strict=True)
    ]
    text = "\n".join(markdown(title, facts, table) for title, table, facts in tables)
    write_atomically(out / "compare.md", text)
    page = out / "compare.html"
    values: dict[str, Any] = {
        "title": f"{runs[0].results.suite}: {len(runs)} runs",
        "settings": [("", *names), *_settings(runs)],
        "tables": tables,
        "changed": {row: _changed(row, runs, show) for row in runs[0].items},
    }
    write_atomically(page, render("compare.html.jinja", Path(__file__).parent, **values))
    return page


def _settings(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """The model and each setting, with a column for each run."""
    all_of = [{"model": run.results.model, **run.results.settings} for run in runs]
    keys = dict.fromkeys(key for settings in all_of for key in settings)
    return [(key, *(str(settings.get(key, "")) for settings in all_of)) for key in keys]


def _changed(row: str, runs: Sequence[Run], show: int) -> tuple[int, list[ChangedItem]]:
    """The number of items of a row that changed in any run, and the first `show` of them."""
    first = runs[0].items[row]
    others = [run.items.get(row, {}) for run in runs[1:]]
    ids = dict.fromkeys(name for other in others for name in changed(first, other))
    return len(ids), [_changed_item(name, row, runs) for name in list(ids)[:show]]


def _changed_item(name: str, row: str, runs: Sequence[Run]) -> ChangedItem:
    item = runs[0].items[row][name]
    pictures: list[tuple[str, str]] = []
    notes = []
    for path in list(item.get("media") or ())[:_MEDIA]:
        try:
            pictures += frames(Path(path), item.get("at"))
        except (OSError, SampleError) as error:
            notes.append(f"{path}: {error}")
    answers = [
        (run.name, number(found.get("score")), str(found.get("answer", "")))
        for run in runs
        if (found := run.items.get(row, {}).get(name))
    ]
    question, reference = (str(item.get(key, "")) for key in ("question", "reference"))
    return ChangedItem(name, question, reference, pictures, notes, answers)


def frames(path: Path, at: float | None) -> list[tuple[str, str]]:
    """(URL, caption) of a picture, or of a video's first and last frames and the one at `at` s
    (None: in the middle).

    Raises OSError, SampleError.
    """
    data = path.read_bytes()
    if path.suffix.lower() in _SUFFIXES:
        return [(_thumb(decode_image(data)), path.name)]
    with open_video(data) as video:
        first, last = video.info.first, video.info.last
        middle = (first + last) / 2 if at is None else min(max(at, first), last)
        times = [first, middle, last]
        return [
            (_thumb(frame), f"{path.name}, {time:.1f} s")
            for frame, time in zip(video.frames(times), times, strict=True)
        ]


def _thumb(pixels: Any) -> str:
    return picture_url(Image.fromarray(pixels.permute(1, 2, 0).numpy()), _THUMB)
