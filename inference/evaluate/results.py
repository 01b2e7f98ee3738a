"""Reads and writes the results of an evaluation, in one form for all suites.

    OUT/run.json                 which model and weights were evaluated, with which settings
    OUT/items/ROW.jsonl          a line for each item, added when it is done
    OUT/results.json .md .html   the table

An item is a dict: `id` (text, unique in its row), `row`, `score` (in the row's unit), `correct`
(true or false, where an answer is one of them), `question`, `answer`, `reference`, `media` (paths),
`pictures` (digests of pictures that are no files), `at` (seconds of the media at which it was
asked), and what else a suite adds. An item that could
not be asked has a short reason in place of a score: `skipped` (`no media`). An item whose request
failed has the error: `failed`. Neither counts as a wrong answer, and a run that goes on after a
stop asks both again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, unquote

from data_pipeline.atomic import unlock, write_atomically
from data_pipeline.commands import DONE, FAILED
from data_pipeline.page import render
from data_pipeline.tables import format_table
from inference.export_info import weights_of

RUN, RESULTS, ITEMS = "run.json", "results.json", "items"
QUESTIONS = "questions"  # the setting with a digest of each file of questions
# Settings that may change when a run goes on in the folder of an earlier one.
FREE = ("limit", "replicas")
Item = dict[str, Any]


class BenchmarkError(ValueError):
    """Something cannot be evaluated or compared; the text names it and says what to do."""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    row: str
    metric: str
    value: float | None  # in the metric's unit; None: no item was scored
    count: int  # items that the value is the mean of
    of: int  # items of the benchmark (with `--limit`: those asked for)
    failed: int = 0  # items whose requests failed
    skipped: Mapping[str, int] = field(default_factory=dict)  # items left out, by reason
    beside: Mapping[str, float] = field(default_factory=dict)  # the metric of others, by name
    settings: Mapping[str, Any] = field(default_factory=dict)  # of this row alone
    view: bool = False  # whether its items are those of another row, looked at in another way

    @property
    def missing(self) -> int:
        """Items that were not asked, because the run was stopped."""
        return self.of - self.count - self.failed - sum(self.skipped.values())

    @property
    def lacks(self) -> str:
        """The number of items that the value leaves out, with the reasons."""
        counts = {"failed": self.failed, "not asked": self.missing, **self.skipped}
        return ", ".join(f"{count} {why}" for why, count in counts.items() if count)


def mean_row(
    row: str, metric: str, items: Iterable[Item], of: int, key: str = "score", **more: Any
) -> Row:
    """The mean of `key` over the items that have it. `more`: fields of Row."""
    items = list(items)
    values = [float(item[key]) for item in items if item.get(key) is not None]
    failed = sum("failed" in item for item in items)
    skipped = Counter(item["skipped"] for item in items if "skipped" in item)
    value = sum(values) / len(values) if values else None
    return Row(row, metric, value, len(values), of, failed, dict(sorted(skipped.items())), **more)


@dataclass
class Results:
    """The table of a model and a suite."""

    model: str
    suite: str
    settings: Mapping[str, Any]
    rows: Sequence[Row]

    @property
    def exit_code(self) -> int:
        """FAILED where requests failed or the run ended before all items were asked, else DONE."""
        return FAILED if any(row.failed or row.missing for row in self.rows) else DONE

    def cells(self) -> list[list[str]]:
        """The cells of the table, row by row, the header first."""
        beside = list(dict.fromkeys(name for row in self.rows for name in row.beside))
        settings = list(dict.fromkeys(name for row in self.rows for name in row.settings))
        head = ["", "metric", "value", *beside, "n", "of", "left out", *settings]
        return [
            head,
            *(
                [row.row, row.metric, number(row.value)]
                + [number(row.beside.get(name)) for name in beside]
                + [str(row.count), str(row.of), row.lacks]
                + [str(row.settings.get(name, "")) for name in settings]
                for row in self.rows
            ),
        ]

    def text(self) -> str:
        """The table for a terminal."""
        return format_table(self.cells(), "llr", rule=True)

    def write(self, out: Path) -> None:
        """Writes results.json, results.md and results.html."""
        write_atomically(out / RESULTS, json.dumps(asdict(self), indent=1) + "\n")
        cells, facts = self.cells(), [f"{name}: {value}" for name, value in self.settings.items()]
        title = f"{self.suite}: {self.model}"
        write_atomically(out / "results.md", markdown(title, facts, cells))
        page = render(
            "results.html.jinja", Path(__file__).parent, title=title, facts=facts, cells=cells
        )
        write_atomically(out / "results.html", page)


def number(value: float | None) -> str:
    """A value as a cell of a table; empty for None."""
    return "" if value is None else f"{value:.4g}"


def markdown(title: str, facts: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A page with one table."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    rows = [f"| {' | '.join(row)} |" for row in lines]
    rule = f"|{'---|' * len(cells[0])}"
    return "\n".join(
        [f"# {title}", "", *(f"- {x}" for x in facts), "", rows[0], rule, *rows[1:], ""]
    )


def read_results(out: Path) -> Results:
    """Reads what `Results.write` wrote. Raises BenchmarkError, which names the file or field."""
    path = out / RESULTS
    try:
        found = json.loads(path.read_text())
        return Results(**{**found, "rows": [Row(**row) for row in found["rows"]]})
    except OSError as error:
        raise BenchmarkError(
            f"{path}: {error.strerror}: give the --out of a finished run"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"{path}: is not an evaluation's results: {error}") from None


def read_items(out: Path) -> dict[str, dict[str, Item]]:
    """The items that have an answer, by row and id."""
    paths = sorted((out / ITEMS).glob("*.jsonl"))
    return {
        unquote(path.stem): {k: v for k, v in _lines(path)[0].items() if _done(v)} for path in paths
    }


class ItemFile:
    """The file of a row's items, in the order in which they were done. Several threads may add."""

    def __init__(self, path: Path) -> None:
        """Reads the items of earlier runs. Removes lines that a kill has cut off, and items that
        failed or were skipped: these are asked again."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        found, torn = _lines(path)
        self.items = {name: item for name, item in found.items() if _done(item)}
        if torn or len(self.items) < len(found):
            write_atomically(path, b"".join(map(_line, self.items.values())))

    def __contains__(self, name: str) -> bool:
        """Whether an item is done."""
        return name in self.items and _done(self.items[name])

    def add(self, item: Item) -> None:
        """Appends an item. ValueError: its `id` is not a text, or the file has it already."""
        name = item["id"]
        if not isinstance(name, str) or name in self.items:
            raise ValueError(f"{self.path}: {name!r}: the id is not a text, or is there already")
        line = _line(item)
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(file, line)  # one call: lines of threads do not mix
        finally:
            os.close(file)
        self.items[name] = item


class EvaluationRun:
    """The folder of a run, written by one process at a time; a later one goes on from there."""

    def __init__(
        self,
        out: Path,
        model: str,
        suite: str,
        settings: Mapping[str, Any],
        weights: str | None = None,
    ) -> None:
        """model: path of an export, or a server's address. weights: what a server says of its
        weights; None: those of the export.

        Raises BenchmarkError where the folder is that of another model, suite or settings, cannot
        be written, or is being written.
        """
        self.out, self.model, self.suite, self.settings = out, model, suite, dict(settings)
        weights = weights_of(Path(model)) if weights is None else weights
        begun = {"model": model, "weights": weights, "suite": suite, **settings}
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(out, os.O_RDONLY)
        except OSError as error:
            raise BenchmarkError(f"{out}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _check_same(out / RUN, begun)
        except BlockingIOError:
            self._close()
            raise BenchmarkError(f"{out}: another process is writing it") from None
        except OSError as error:
            self._close()
            raise BenchmarkError(f"{out}: cannot be written: {error.strerror}") from None
        except BenchmarkError:
            self._close()
            raise

    def items(self, row: str) -> ItemFile:
        """A row's items, with those of an earlier run."""
        return ItemFile(self.out / ITEMS / f"{quote(row, safe=' ()+')}.jsonl")

    def replace(self, row: str, items: Iterable[Item]) -> None:
        """Writes a row's items in place of those of earlier runs."""
        write_atomically(self.items(row).path, b"".join(map(_line, items)))

    def finish(self, rows: Sequence[Row]) -> Results:
        """Writes the table."""
        results = Results(self.model, self.suite, self.settings, rows)
        results.write(self.out)
        return results

    def _close(self) -> None:
        unlock(self._lock)
        os.close(self._lock)

    def __enter__(self) -> EvaluationRun:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()


def digest_of(path: Path) -> str:
    """A digest of a file, or of a folder's files."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if file.suffix != ".pyc":
            digest.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _check_same(path: Path, wanted: dict[str, Any]) -> None:
    """Writes run.json; raises BenchmarkError where an earlier run wrote other settings. A run may
    ask of more `questions` than an earlier one."""
    wanted = json.loads(json.dumps(wanted))
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        found = wanted
    except ValueError as error:
        raise BenchmarkError(f"{path}: is not JSON ({error}): choose another --out") from None
    earlier, now = ((run.get(QUESTIONS) or {}) for run in (found, wanted))
    found, wanted = found | {QUESTIONS: now | earlier}, wanted | {QUESTIONS: earlier | now}
    for name in [*found, *wanted]:
        if name not in FREE and found.get(name) != wanted.get(name):
            raise BenchmarkError(
                f"{path.parent}: was begun with {name} {found.get(name)!r}, not"
                f" {wanted.get(name)!r}: choose another --out, or remove it"
            )
    write_atomically(path, json.dumps(wanted, indent=1) + "\n")


def _done(item: Item) -> bool:
    return "failed" not in item and "skipped" not in item


def _line(item: Item) -> bytes:
    return json.dumps(item, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _lines(path: Path) -> tuple[dict[str, Item], int]:
    """The items of a file by id (the last line of an id counts), and the number of broken lines."""
    data = path.read_bytes() if path.exists() else b""
    found: dict[str, Item] = {}
    torn = 0
    for line in data.splitlines(keepends=True):
        try:
            item = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            item = None
        if isinstance(item, dict) and isinstance(item.get("id"), str):
            found[item["id"]] = item
        else:
            torn += 1
    return found, torn
