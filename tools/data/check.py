"""`import --check`: reports what an import would make of a source, without writing shards."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from data_pipeline import files
from data_pipeline.build import BuildOptions
from data_pipeline.importers.draft import Entry
from data_pipeline.importers.forms import OpenSource, open_source
from data_pipeline.importers.media import Outcome
from data_pipeline.importers.pool import Pool
from data_pipeline.importers.prefetch import read_ahead
from data_pipeline.importers.share import WHOLE
from data_pipeline.progress import Progress
from data_pipeline.schema import SampleError
from tools.shards.find import StoredSample

_UNREAD = "file not read"
EXAMPLES = 3  # of each reason and note


@dataclass
class CheckedSource:
    """What a source holds: samples by group, records by reason, notes, and examples of the latter.

    samples: the first ones that can be used, as their shards would hold them.
    """

    form: str
    usable: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    examples: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    samples: list[StoredSample] = field(default_factory=list)

    @property
    def records(self) -> int:
        return self.usable.total() + self.skipped.total()

    def add(self, outcome: Outcome, keep: int) -> None:
        where = f"{outcome.key} ({outcome.file})"
        if isinstance(outcome.sample, SampleError):
            reason = outcome.sample.reason
            self.skipped[reason] += 1
            self._example(f"skipped, {reason}", f"{where}: {outcome.sample.detail}")
            return
        self.usable[outcome.group] += 1
        for note in outcome.notes:
            self.noted[note] += 1
            self._example(f"noted, {note}", where)
        if len(self.samples) < keep:
            parts = {name: data for name, data in outcome.sample.items() if name != "__key__"}
            self.samples.append(StoredSample(outcome.key, Path(outcome.file), parts))

    def leave_out(self, paths: Sequence[str]) -> None:
        """Files of the source that look like data and are not read."""
        for path in paths:
            self.noted[_UNREAD] += 1
            self._example(f"noted, {_UNREAD}", path)

    def _example(self, what: str, example: str) -> None:
        examples = self.examples[what]
        if len(examples) < EXAMPLES and example not in examples:
            examples.append(example)

    def lines(self) -> list[str]:
        """The report as text."""
        lines = [f"form: {self.form}"]
        lines += [f"{group}: {count} samples" for group, count in self.usable.items()]
        for what, counts in (("skipped", self.skipped), ("noted", self.noted)):
            for name, count in sorted(counts.items()):
                lines.append(f"{what}, {name}: {count}")
                lines += [f"    {example}" for example in self.examples[f"{what}, {name}"]]
        return [*lines, f"{self.records} records: {self.usable.total()} usable, "
                        f"{self.skipped.total()} skipped"]  # fmt: skip


def form_name(opened: OpenSource) -> str:
    return ", ".join(opened.found) or opened.form


def check_source(source: str, options: BuildOptions, limit: int | None, keep: int) -> CheckedSource:
    """Reads, decodes and converts the first `limit` records (None: all); keeps `keep` samples.
    Raises ShardError for a source that cannot be used."""
    files.use_stores(options.stores)
    pool = Pool(options.workers)
    try:
        opened = open_source(source, options.source, Path(os.devnull))
        checked = CheckedSource(form_name(opened))
        checked.leave_out(opened.unread)
        progress = Progress("check", unit="records")
        entries = (
            Entry(entry.key, entry.file, entry.share, entry.draft, index)
            for index, entry in enumerate(islice(opened.entries(WHOLE), limit))
        )
        for outcome in pool.finish(read_ahead(entries, options.stores), options.media):
            checked.add(outcome, keep)
            skipped = checked.skipped.total()
            progress.step(share=outcome.share, note=f"{skipped} skipped" if skipped else "")
        checked.noted.update(opened.left_out)
        progress.end()
    finally:
        pool.close()
    return checked
