"""LLaMA-Factory's `dataset_info.json`: data sets with their own columns and tags.

Names and defaults of columns and tags are LLaMA-Factory's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from data_pipeline import files
from data_pipeline.importers.conversation import (
    Dialect,
    conversation_draft,
    system_turn,
    with_media,
)
from data_pipeline.importers.draft import (
    IMAGE_FIELDS,
    VIDEO_FIELDS,
    Draft,
    text_draft,
    unused_fields,
)
from data_pipeline.importers.pairs import history_turns, turn
from data_pipeline.schema import Role, SampleError
from data_pipeline.shards import ShardError
from data_pipeline.strict_json import loads

_Part = TypeVar("_Part", "Columns", "Tags")


@dataclass(frozen=True)
class Columns:
    """Which column of a record holds what; None: it has no such column."""

    prompt: str | None = "instruction"
    query: str | None = "input"
    response: str | None = "output"
    history: str | None = None
    messages: str = "conversations"
    system: str | None = None
    tools: str | None = None
    images: str | None = None
    videos: str | None = None


@dataclass(frozen=True)
class Tags:
    """How messages name their parts and their roles."""

    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    observation_tag: str = "observation"
    function_tag: str = "function_call"
    system_tag: str = "system"

    def roles(self) -> dict[str, Role]:
        return {
            self.user_tag: "user",
            self.observation_tag: "user",
            self.assistant_tag: "assistant",
            self.function_tag: "assistant",
            self.system_tag: "system",
        }


# Columns of a record without a dataset_info.json.
ALPACA = Columns(history="history", system="system", tools="tools")
_HUBS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url")
_PLACES = ("file_name", "cloud_file_name", *_HUBS)
# Keys of an entry that are known: some are used, others matter to LLaMA-Factory alone.
_ENTRY = frozenset({
    *_PLACES, "formatting", "columns", "tags", "num_samples", "ranking", "subset", "split",
    "folder",
})  # fmt: skip


@dataclass(frozen=True)
class DataSet:
    """One entry of a dataset_info.json."""

    name: str
    file: str  # path or URL of its file, or folder of files
    sharegpt: bool
    columns: Columns = field(default_factory=Columns)
    tags: Tags = field(default_factory=Tags)
    limit: int | None = None  # records that are taken at most

    @property
    def form(self) -> str:
        plain = not self.sharegpt and self.columns.response is None
        return "text" if plain else "llamafactory"

    def draft(self, record: dict[str, Any], base: str) -> Draft:
        """A record of this data set; SampleError where it does not fit."""
        columns, tags = self.columns, self.tags
        if not self.sharegpt:
            return alpaca_draft(record, base, columns)
        dialect = Dialect(
            messages=columns.messages,
            role=tags.role_tag,
            content=tags.content_tag,
            roles=tags.roles(),
            system=columns.system,
            tools=_names(columns.tools),
            images=_names(columns.images),
            videos=_names(columns.videos),
        )
        return conversation_draft(record, base, dialect)


def names_data_sets(info: str) -> bool:
    """Whether an entry of a dataset_info.json says where its data set is: others have such files,
    too."""
    try:
        with files.open_file(info) as file:
            entries = loads(file.read())
    except ValueError:
        return False
    return isinstance(entries, dict) and any(
        isinstance(entry, dict) and isinstance(entry.get(place), str)
        for entry in entries.values()
        for place in _PLACES
    )


def read_info(path: str, names: tuple[str, ...]) -> list[DataSet | tuple[str, SampleError]]:
    """The data sets of a dataset_info.json: those of these `names`, or all.

    One that cannot be imported (it is on a hub, or has preferences) is its name with the reason.
    Raises ShardError for a wrong file or name.
    """
    with files.open_file(path) as file:
        try:
            info = loads(file.read())
        except ValueError as error:
            raise ShardError(f"{path} cannot be read: {error}") from None
    if not isinstance(info, dict) or not all(isinstance(entry, dict) for entry in info.values()):
        raise ShardError(f"{path}: expected an object with a data set, an object, under each name")
    unknown = sorted(set(names) - set(info))
    if unknown:
        raise ShardError(f"{path}: no data set {', '.join(unknown)}; it has {', '.join(info)}")
    folder = files.parent(path)
    return [_data_set(folder, name, info[name]) for name in names or info]


def _data_set(folder: str, name: str, entry: dict[str, Any]) -> DataSet | tuple[str, SampleError]:
    file = entry.get("cloud_file_name") or entry.get("file_name")
    formatting = entry.get("formatting", "alpaca")
    elsewhere = [key for key in _HUBS if entry.get(key)]
    if elsewhere or not file:
        detail = f"has {elsewhere[0]}" if elsewhere else "has no file_name"
        return name, SampleError("unsupported_data_set", f"{detail}: download it, name its file")
    if entry.get("ranking"):
        return name, SampleError("unsupported_data_set", "ranking: preferences cannot be imported")
    unknown = sorted(key for key in set(entry) - _ENTRY if entry[key])
    if unknown:
        return name, SampleError("unsupported_data_set", f"{unknown[0]}: unknown, not done")
    columns_entry = entry.get("columns") or {}
    try:
        if formatting not in ("alpaca", "sharegpt"):
            raise ValueError(f"formatting: {formatting!r}, allowed: alpaca, sharegpt")
        columns = _part(Columns(), columns_entry, "columns")
        tags = _part(Tags(), entry.get("tags") or {}, "tags")
    except ValueError as error:
        return name, SampleError("unsupported_data_set", str(error))
    if {"prompt", "query", "response"}.intersection(columns_entry) == {"prompt"}:
        columns = replace(columns, response=None)  # plain text for pretraining
    limit = entry.get("num_samples")
    return DataSet(name, files.join(folder, file), formatting == "sharegpt", columns, tags, limit)


def _part(default: _Part, values: dict[str, Any], where: str) -> _Part:
    """The defaults with what is given; ValueError for unknown names."""
    names = {part.name for part in fields(default)}
    for name, value in values.items():
        if name not in names:
            raise ValueError(f"{where}.{name}: unknown, allowed: {', '.join(sorted(names))}")
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{where}.{name}: {value!r} is not a name")
    return replace(default, **values)


def alpaca_draft(record: dict[str, Any], base: str, columns: Columns = ALPACA) -> Draft:
    """A record with instruction, input and output; `history` holds the turns before."""
    own = columns is ALPACA
    parts = (columns.prompt, columns.query, columns.response, columns.history)
    dialect = Dialect(
        messages="",
        system=columns.system,
        tools=_names(columns.tools),
        images=IMAGE_FIELDS if own else _names(columns.images),
        videos=VIDEO_FIELDS if own else _names(columns.videos),
        others=_names(*parts),
    )
    if columns.response is None:
        notes = unused_fields(record, dialect.known)
        return text_draft(record.get(columns.prompt or ""), tuple(notes))
    messages = system_turn(record, dialect)
    if columns.history:
        messages += history_turns(record.get(columns.history), columns.history)
    question = [_text(record, column) for column in (columns.prompt, columns.query)]
    answer = record.get(columns.response)
    messages += turn("\n".join(filter(None, question)), answer, f"{columns.response}")
    return with_media(messages, record, base, dialect)


def _names(*columns: str | None) -> tuple[str, ...]:
    return tuple(column for column in columns if column)


def _text(record: dict[str, Any], column: str | None) -> str:
    value = record.get(column) if column else None
    if value is not None and not isinstance(value, str):
        raise SampleError("bad_schema", f"{column}: {value!r:.80} is not a text")
    return value or ""
