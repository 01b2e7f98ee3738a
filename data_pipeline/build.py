"""Imports data sets of many forms into shards.

SOURCE is a file or folder, a path or URL (s3://, gs://, https://): records in ShareGPT or alpaca
form, of real-time data sets, a LLaMA-Factory dataset_info.json, plain text, tables of captions,
folders of pictures or videos with captions or transcripts, or shards of others. OUT gets a folder
of indexed shards for each of `text`, `image`, `video` and `realtime` that occurs, and
`rejected.jsonl`. An import that was stopped goes on with the same command.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_pipeline import files
from data_pipeline.cgroups import cores
from data_pipeline.commands import STOPPED, WRONG_USAGE, CommandParser, describe, report_error
from data_pipeline.fields import check_values, number
from data_pipeline.importers.draft import Entry
from data_pipeline.importers.forms import FORMS, OpenSource, SourceOptions, open_source
from data_pipeline.importers.journal import REJECTED, Journal, Summary
from data_pipeline.importers.media import MediaOptions, Outcome
from data_pipeline.importers.pool import Pool
from data_pipeline.importers.prefetch import read_ahead
from data_pipeline.importers.share import WHOLE
from data_pipeline.index import prepare_index
from data_pipeline.progress import Progress
from data_pipeline.schema import SampleError
from data_pipeline.shards import ShardError, ShardWriter, check_source
from data_pipeline.stores import StoreOptions, without_secrets

_VERSION = 10  # of the importers: what a source becomes changes with it
_NAMED = 3  # files that are not read
_SHARE_FROM = 1000  # records, before which a share means little


@dataclass(frozen=True)
class BuildOptions:
    """How a source becomes shards; wrong values raise ValueError that names the field."""

    source: SourceOptions = field(default_factory=SourceOptions)
    media: MediaOptions = field(default_factory=MediaOptions)
    samples_per_shard: int = number(1000, above=0)
    # MB (10^6 bytes) after which the next shard begins.
    shard_size: float = number(512.0, above=0)
    max_rejected: float | None = number(None, least=0)  # records, or, below 1, their share
    workers: int = number(0, least=0, zero="this process alone")  # processes
    stores: StoreOptions = field(default_factory=StoreOptions)  # how media that are URLs are read

    def __post_init__(self) -> None:
        check_values(self)


class TooManyRejectedError(ShardError):
    """More records were rejected than --max-rejected allows."""


def build_shards(
    source: str | Path, out_dir: str | Path, options: BuildOptions | None = None
) -> Summary:
    """Imports everything under `source`, or goes on with an import that was stopped.

    A record that cannot be used is written to `rejected.jsonl` with its key and the reason.
    Raises ShardError for a source or target that cannot be used, TooManyRejectedError.
    """
    options = options or BuildOptions()
    if files.is_url(str(out_dir)):
        raise ShardError(f"{out_dir}: shards are written to a local folder: copy them from there")
    out = Path(out_dir)
    files.use_stores(options.stores)
    pool = Pool(options.workers)
    try:
        opened = open_source(str(source), options.source, out)
        name = without_secrets(str(source))
        print(f"{name}: form {', '.join(opened.found) or opened.form}", file=sys.stderr)
        print_unread(opened)
        journal = Journal(out, arguments_of(str(source), opened, options))
        try:
            if journal.finished:
                print(f"{out}: finished already, nothing to do", file=sys.stderr)
            else:
                progress = Progress("import", unit="records")
                import_entries(opened.entries(WHOLE), journal, pool, options, progress)
                index_groups(out, journal.shards, max(1, options.workers))
                journal.finish(opened.left_out)
        finally:
            journal.close()
    finally:
        pool.close()
    return journal.summary


def print_unread(opened: OpenSource) -> None:
    """Names the files of a source that look like data and are not read."""
    if opened.unread:
        names = ", ".join(opened.unread[:_NAMED])
        more = f" and {len(opened.unread) - _NAMED} more" if len(opened.unread) > _NAMED else ""
        print(f"not read: {names}{more}", file=sys.stderr)


def arguments_of(source: str, opened: OpenSource, options: BuildOptions) -> dict[str, object]:
    """Everything that decides what the shards hold."""
    return {
        "version": _VERSION,
        "source": source if files.is_url(source) else os.path.abspath(source),
        "source_files": opened.fingerprint(),
        **asdict(options.source),
        "form": opened.form,
        **asdict(options.media),
        "samples_per_shard": options.samples_per_shard,
        "shard_size": options.shard_size,
    }


def import_entries(
    entries: Iterable[Entry],
    journal: Journal,
    pool: Pool,
    options: BuildOptions,
    progress: Progress,
    prefix: str = "shard",
) -> None:
    """Writes the shards of the entries that no finished shard has, called `PREFIX-000000.tar`, ...

    Raises TooManyRejectedError.
    """
    groups: dict[str, _Group] = {}
    seen = 0
    coming = read_ahead(_unhandled(entries, journal), options.stores)
    for outcome in pool.finish(coming, options.media):
        seen = outcome.index + 1
        if isinstance(outcome.sample, SampleError):
            journal.reject(outcome, outcome.sample)
            check_rejected(journal.summary, options.max_rejected, seen)
        else:
            if outcome.group not in groups:
                groups[outcome.group] = _Group(outcome.group, journal, options, prefix)
            groups[outcome.group].write(outcome)
        rejected = journal.summary.rejected.total()
        progress.step(share=outcome.share, note=f"{rejected} rejected" if rejected else "")
    for group in groups.values():
        group.finish()
    progress.end(f"{journal.summary.rejected.total()} rejected")
    check_rejected(journal.summary, options.max_rejected, journal.summary.records, last=True)


def _unhandled(entries: Iterable[Entry], journal: Journal) -> Iterator[Entry]:
    """The entries, numbered, that no finished shard accounts for."""
    for index, entry in enumerate(entries):
        if not journal.handled(entry.group, index):
            yield Entry(entry.key, entry.file, entry.share, entry.draft, index)


class _Group:
    """The shards of one group while they are written."""

    def __init__(self, name: str, journal: Journal, options: BuildOptions, prefix: str) -> None:
        self._name, self._journal = name, journal
        self._writer = ShardWriter(
            journal.out / name,
            options.samples_per_shard,
            int(options.shard_size * 1e6),
            prefix,
            first=journal.shards[name],
        )
        self._samples, self._last = 0, -1
        self._notes: Counter[str] = Counter()

    def write(self, outcome: Outcome) -> None:
        assert isinstance(outcome.sample, dict)
        self._samples, self._last = self._samples + 1, outcome.index
        self._notes.update(outcome.notes)
        self._note(self._writer.write(outcome.sample))

    def finish(self) -> None:
        self._note(self._writer.finish())

    def _note(self, shard: Path | None) -> None:
        if shard is not None:
            self._journal.shard_done(self._name, shard, self._samples, self._last, self._notes)
            self._samples, self._notes = 0, Counter()


def check_rejected(summary: Summary, limit: float | None, records: int, last: bool = False) -> None:
    """A number of records stops the import at once, a share as soon as it means something."""
    if limit is None:
        return
    rejected = summary.rejected.total()
    share = 0 < limit < 1
    decided = last or not share or records >= _SHARE_FROM
    if decided and rejected > (limit * records if share else limit):
        reasons = ", ".join(f"{reason} {count}" for reason, count in summary.rejected.items())
        raise TooManyRejectedError(
            f"{rejected} of {records} records rejected ({reasons}), more than --max-rejected "
            f"{limit:g} allows: see {REJECTED}. Correct the source and import it into a new "
            "folder, or allow more and run the same command again to go on"
        )


def index_groups(out: Path, groups: Iterable[str], workers: int) -> None:
    """Makes the index of each group of shards in `out` that has none."""
    for group in groups:
        started = time.perf_counter()
        try:
            check_source(out / group)
        except ShardError:
            prepare_index(out / group, workers)
        seconds = time.perf_counter() - started
        if seconds > 1:
            print(f"{out / group}: indexed in {seconds:.0f} s", file=sys.stderr)


def options_of(args: argparse.Namespace) -> BuildOptions:
    return BuildOptions(
        source=SourceOptions(
            form=args.form,
            media_dir=args.media_dir,
            datasets=tuple(args.dataset.split(",")) if args.dataset else (),
            splits=tuple(args.split.split(",")) if args.split else (),
            media_column=args.media_column,
            caption_column=args.caption_column,
            window=args.window,
        ),
        media=MediaOptions(max_side=args.max_side, video_fps=args.video_fps),
        samples_per_shard=args.samples_per_shard,
        shard_size=args.shard_size,
        max_rejected=args.max_rejected,
        workers=args.workers,
        stores=StoreOptions(
            cache=args.cache,
            cache_size=args.cache_size,
            read_ahead=args.read_ahead,
            retries=args.request_retries,
            timeout=args.timeout,
        ),
    )


def add_options(parser: argparse.ArgumentParser, out: str | None = None) -> None:
    """The arguments of an import; `out`: "?" where OUT may be missing."""
    add, options = parser.add_argument, BuildOptions()
    add("source", metavar="SOURCE", help="file or folder, path or URL")
    add("out", metavar="OUT", type=Path, nargs=out,
        help="folder of the shards; an unfinished one is continued")  # fmt: skip
    add("--form", choices=FORMS, help="form of SOURCE (default: found from its files)")
    add("--media-dir", "--media-root", help="folder that media paths are relative to, or tar that "
        "has them (default: the records' folder)")  # fmt: skip
    add(
        "--dataset",
        metavar="NAME[,NAME...]",
        help="data sets of a dataset_info.json (default: all)",
    )
    add("--split", metavar="NAME[,NAME...]", help="splits whose records are taken, of records "
        "with a field split or subset, and files named after one (default: all)")  # fmt: skip
    add("--media-column", help="column or field of the media (default: found by its name)")
    add("--caption-column", help="a table's column of captions (default: found by its name)")
    add("--window", type=int, default=options.source.window, metavar="SECONDS",
        help="commentary and narrations that are longer become several samples")  # fmt: skip
    add(
        "--samples-per-shard",
        type=int,
        default=options.samples_per_shard,
        help="samples of a shard",
    )
    add("--shard-size", type=float, default=options.shard_size, help="size of a shard in MB")
    add("--max-side", type=int, metavar="PIXELS", help="encode pictures (JPEG) and videos (H.264) "
        "with a longer side anew, at this size (default: kept as they are)")  # fmt: skip
    add("--video-fps", type=float, metavar="FPS", help="encode videos with more frames a second "
        "anew (H.264), at this rate (default: kept as they are)")  # fmt: skip
    add("--max-rejected", type=float, metavar="N", help="rejected records after which the import "
        "fails: a number (1, 2, ...) or a share (0.01) (default: no limit)")  # fmt: skip
    add("--workers", type=int, default=cores(), help="processes (default: one a core)")
    _add_store_options(parser, options.stores)


def _add_store_options(parser: argparse.ArgumentParser, stores: StoreOptions) -> None:
    add = parser.add_argument
    add("--timeout", type=float, default=stores.timeout,
        help="seconds that a server may not answer")  # fmt: skip
    add("--request-retries", type=int, default=stores.retries, metavar="N",
        help="object stores: times that a request is made again that fails")  # fmt: skip
    add("--read-ahead", type=int, default=stores.read_ahead, metavar="N",
        help="object stores: records whose media are fetched before their turn")  # fmt: skip
    add("--cache", default=stores.cache, metavar="FOLDER",
        help="object stores: folder of the local cache (default: below /tmp)")  # fmt: skip
    add("--cache-size", type=float, default=stores.cache_size, metavar="GB",
        help="object stores: size of the cache; 0: none, and nothing ahead")  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser("python -m data_pipeline.build", description=__doc__)
    add_options(parser)
    return run(parser.parse_args(arguments), parser.prog)


def run(args: argparse.Namespace, program: str) -> int:
    """The import that `add_options` describes; returns the exit code."""
    try:
        summary = build_shards(args.source, args.out, options_of(args))
    except ShardError as error:
        return report_error(program, error)
    except ValueError as error:
        return report_error(program, error, WRONG_USAGE)
    except OSError as error:
        return report_error(program, describe(error))
    except KeyboardInterrupt:
        return report_error(program, "interrupted: the same command goes on", STOPPED)
    print_summary(args.out, summary)
    return 0 if summary.imported else 1


def print_summary(out: Path, summary: Summary) -> None:
    for group, count in summary.imported.items():
        print(f"{out / group}: {count} samples")
    for reason, count in summary.rejected.items():
        print(f"rejected, {reason}: {count} (see {out / REJECTED})")
    for note, count in sorted(summary.notes.items()):
        print(f"noted, {note}: {count}")
    print(f"{summary.records} records: {summary.imported.total()} imported, "
          f"{summary.rejected.total()} rejected")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
