"""What a source is by the names of its files: its form, where its records are, what is not read."""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Sequence
from itertools import islice

from data_pipeline import files
from data_pipeline.importers import captions, llama_factory, speech, transcripts
from data_pipeline.importers.archive import names
from data_pipeline.importers.by_lists import answers_among
from data_pipeline.importers.recognize import form_of
from data_pipeline.importers.records import first_records
from data_pipeline.shards import ShardError

INFO = "dataset_info.json"
METADATA = tuple(f"metadata{suffix}" for suffix in (".jsonl", ".csv", ".parquet"))
# Suffixes of files that may be part of a data set and that no importer reads.
_DATA = frozenset({
    ".zip", ".7z", ".rar", ".gz", ".zst", ".xz", ".bz2", ".feather", ".tfrecord", ".lmdb", ".mdb",
    ".h5", ".hdf5", ".pkl", ".pickle", ".npz", ".xlsx", ".xls", ".yaml", ".yml", ".ass", ".ssa",
    ".json3", ".srv3", ".ttml", ".lrc", ".sbv",
})  # fmt: skip
_TEXTS = (".json", ".txt", ".text", ".caption")  # of shards: what is said of a sample
_LOOKED_AT = 200  # members of a tar, by which it is one of shards or of media


def form_of_files(source: str, folder: bool, paths: list[str]) -> str:
    """A form, or `records`: files of records, each with a form of its own; ShardError."""
    there = {files.name(path) for path in paths}
    info = files.join(source, INFO) if folder else source
    if info in paths and files.name(info) == INFO and info not in _about_arrow(paths):
        return "llamafactory"
    plain = [path for path in paths if is_records(path)]
    tars = [path for path in paths if is_tar(path)]
    if tars and not (plain and not any(map(_has_texts, tars))):
        return "webdataset"
    if not folder and files.suffix(source) in (".srt", ".vtt"):
        return "transcripts"
    if not folder or there.intersection(METADATA):
        return "records"
    if any(video and _is_transcript(path) for path, video in transcripts.pairs(paths)):
        return "transcripts"
    if captions.is_captioned(paths):
        return "captions"
    if plain:
        return "records"
    if any(captions.media_type(path) for path in paths):
        return "captions"
    raise ShardError(
        f"{source}: no JSON file, table, shard, picture or video there: give records "
        f"({', '.join(sorted(files.RECORD_SUFFIXES))}), a folder of media with .txt captions, "
        "or shards"
    )


def _about_arrow(paths: Iterable[str]) -> frozenset[str]:
    """What Hugging Face's datasets put beside the .arrow files of a set, and above its splits. A
    dataset_info.json that names files is LLaMA-Factory's, which reads .arrow, too."""
    folders = {files.parent(path) for path in paths if files.suffix(path) == ".arrow"}
    above = {files.parent(folder) for folder in folders}

    def is_theirs(path: str) -> bool:
        name, parent = files.name(path), files.parent(path)
        if name == "dataset_dict.json":
            return parent in above
        known = name in (INFO, "state.json") and parent in folders
        return known and not (name == INFO and llama_factory.names_data_sets(path))

    return frozenset(filter(is_theirs, paths))


def is_tar(path: str) -> bool:
    return files.suffix(path) in files.TAR_SUFFIXES or files.name(path).endswith(".tar.gz")


def is_records(path: str) -> bool:
    return files.record_suffix(path) in files.RECORD_SUFFIXES


def with_kinds(error: ShardError, path: str) -> ShardError:
    """The error of a file that cannot be read; where its kind is none that can be read, with those
    that can."""
    if is_records(path):
        return error
    kinds = ", ".join(sorted(files.RECORD_SUFFIXES, key=lambda kind: (kind == ".arrow", kind)))
    return ShardError(
        f"{error}: records are read from {kinds} (also .gz, .zst), shards from .tar, .tgz and "
        ".tar.gz: convert or unpack it"
    )


def is_dangling(path: str) -> bool:
    """Whether a path is a link to nothing."""
    return os.path.islink(path) and not os.path.exists(path)


def _has_texts(tar: str) -> bool:
    """Whether a tar has texts beside its media; of a server's, which is not looked into, that is
    taken for granted."""
    if files.is_url(tar):
        return True
    return any(files.suffix(name) in _TEXTS for name in islice(names(tar), _LOOKED_AT))


def _is_transcript(path: str) -> bool:
    """Whether a file beside a video has its words; other records may have a video's name, too."""
    if files.suffix(path) != ".json":
        return True
    try:
        if not _is_object(path):
            return speech.are_segments(first_records(path, 3))
        records = first_records(path, 1)
    except ShardError:  # told when the words are read
        return True
    return not records or form_of(records[0]) in (None, "text", "speech")


def _is_object(path: str) -> bool:
    with files.open_file(path) as file:
        return not file.read(64).lstrip().startswith(b"[")


def record_files(source: str, folder: bool, paths: list[str]) -> list[list[str]]:
    """The files of records: an image folder's metadata, else those on top; where none of these has
    a known form, the deeper ones."""
    metadata = [path for path in paths if files.name(path) in METADATA]
    about = _about_arrow(paths) | answers_among(paths)
    with_records = [path for path in paths if is_records(path) or not folder]
    with_records = [path for path in with_records if path not in about]
    on_top = [path for path in with_records if files.parent(path) == source.rstrip("/")]
    deeper = [path for path in with_records if path not in on_top]
    groups = [metadata] if metadata else [group for group in (on_top, deeper) if group]
    if not groups:
        raise ShardError(f"{source}: no file of records there: {', '.join(files.RECORD_SUFFIXES)}")
    return groups


def unread(
    paths: Sequence[str], read: Iterable[str], roots: Container[str | None]
) -> tuple[str, ...]:
    """The files of a source that look like data and are not read; tars in one of the `roots` are
    searched for media."""
    known = set(read)
    about = _about_arrow(paths) | answers_among(paths)
    suffixes = _DATA.union(transcripts.SUFFIXES)
    data = [
        path
        for path in paths
        if (is_records(path) or is_tar(path) or files.suffix(path) in suffixes)
        and path not in about
    ]
    return tuple(
        path
        for path in data
        if path not in known and not (files.suffix(path) == ".tar" and files.parent(path) in roots)
    )
