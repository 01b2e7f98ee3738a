"""A tar as samples: members by key wherever they stand, and what cannot be used by name.

A key ends at the first dot of a name, as WebDataset has it. Where no text and no JSON goes by that
key, or a name has both a medium and a text of its own, the names have dots of their own
(`22.05.jpg`, `22.05.txt`), and it ends at the last one.
"""

from __future__ import annotations

import gzip
import shutil
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import PurePosixPath
from typing import BinaryIO, cast

from data_pipeline import files
from data_pipeline.schema import SampleError
from data_pipeline.tar_members import extents_of, stored_size, with_holes

DAMAGE = (tarfile.TarError, EOFError, ValueError, OSError, zlib.error)
_GZIP = b"\x1f\x8b"
_CHUNK = 1 << 20  # bytes that are searched at a time for another archive
_TEXTS = frozenset({"json", "txt", "text", "caption"})


@dataclass
class Members:
    """The members of one key, by the rest of their names in lower case; not read yet.

    repeated: names that stand in the tar more than once.
    """

    key: str
    found: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)

    def add(self, rest: str, member: tarfile.TarInfo) -> None:
        if rest in self.found:
            self.repeated.append(member.name)
        self.found[rest] = member


class Archive:
    """An open tar whose names are known.

    samples: in the order of their first members; of joined tars that have a name in common each
    tar's for themselves. left_out: what is no member of any sample, by kind, counted. damage: what
    ends the archive before its end.
    """

    def __init__(self, file: BinaryIO, damage: Exception | None) -> None:
        self._file, self.damage = file, damage
        self.left_out: Counter[str] = Counter()
        size = file.seek(0, 2)
        file.seek(0)
        joined: dict[int, list[tarfile.TarInfo]] = {}
        try:
            for number, member in members(file):
                stored = stored_size(member.size, extents_of(member))
                if not member.islnk() and member.offset_data + stored > size:
                    raise tarfile.ReadError(f"{member.name} is cut off")
                if self._belongs(member):
                    joined.setdefault(number, []).append(member)
        except DAMAGE as error:
            self.damage = self.damage or error
        if self.damage is None and _ends_early(file, size):
            self.damage = tarfile.ReadError("the end of the archive is missing")
        self._by_name = [{member.name: member for member in tar} for tar in joined.values()]
        apart = sum(map(len, self._by_name)) > len(set().union(*self._by_name))
        tars = list(joined.values()) if apart else [list(chain(*joined.values()))]
        self.samples = [sample for tar in tars for sample in _samples(tar)]

    def read(self, member: tarfile.TarInfo) -> bytes:
        """The bytes of a member, of a link those of its target; SampleError."""
        for _ in range(10):
            if not member.islnk() and not member.issym():
                extents = extents_of(member)
                self._file.seek(member.offset_data)
                stored = self._file.read(stored_size(member.size, extents))
                return with_holes(stored, member.size, extents)
            target = member.linkname
            if member.issym():
                target = str(PurePosixPath(member.name).parent / target)
            found = self._target(member, target)
            if found is None:
                break
            member = found
        raise SampleError("missing_file", f"{member.name} is a link to {member.linkname}, "
                          "which is not in the shard")  # fmt: skip

    def _target(self, link: tarfile.TarInfo, name: str) -> tarfile.TarInfo | None:
        """What a link leads to: of joined tars the member of its own, else of the first one."""
        there = [tar for tar in self._by_name if name in tar]
        own = (tar for tar in there if tar.get(link.name) is link)
        return next((tar[name] for tar in (*own, *there)), None)

    def _belongs(self, member: tarfile.TarInfo) -> bool:
        path = PurePosixPath(member.name)
        base = path.name
        if member.isdir() or (base.startswith("__") and base.endswith("__")):
            return False
        kind = ""
        if base.startswith("._") or base == ".DS_Store" or "__MACOSX" in path.parts:
            kind = "file of macOS"
        elif base.startswith("."):
            kind = "hidden file"
        elif not (member.isfile() or member.islnk() or member.issym()):
            kind = "device"
        elif "." not in base:
            kind = "file without a suffix"
        if kind:
            self.left_out[f"{kind} in a shard"] += 1
            return False
        return True


def members(file: BinaryIO) -> Iterator[tuple[int, tarfile.TarInfo]]:
    """The members of the tars that a file holds one behind the other, each with its tar's number.

    tarfile ends with the first one (`cat a.tar b.tar`), and at any header that it cannot read.
    Raises ReadError where something else than a tar follows.
    """
    number = at = 0
    following: int | None = 0
    while following is not None:
        at = following
        file.seek(at)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                yield number, member
            end = tar.offset
        following = _behind_zeros(file, end)
        if following == at:
            raise tarfile.ReadError(f"byte {at} is not the header of a member")
        number += 1


def _behind_zeros(file: BinaryIO, at: int) -> int | None:
    """Offset of the next block that is not empty; None: there is none up to the file's end."""
    file.seek(at)
    while chunk := file.read(_CHUNK):
        if rest := chunk.lstrip(b"\0"):
            return (at + len(chunk) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        at += len(chunk)
    return None


def _ends_early(file: BinaryIO, size: int) -> bool:
    """An archive ends with zeros; tarfile takes a torn header for the end."""
    file.seek(max(0, size - 512))
    return any(file.read(512))


def _samples(found: list[tarfile.TarInfo]) -> list[Members]:
    groups: dict[str, list[tuple[str, tarfile.TarInfo]]] = {}
    for member in found:
        folder, _, base = member.name.removeprefix("./").rpartition("/")
        stem, _, rest = base.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        groups.setdefault(key, []).append((rest.lower(), member))
    alike = Counter(_names(group) for group in groups.values())
    return [
        sample
        for key, group in groups.items()
        for sample in _group(key, group, alike[_names(group)] > 1)
    ]


def _names(group: list[tuple[str, tarfile.TarInfo]]) -> tuple[str, ...]:
    return tuple(sorted(rest for rest, _ in group))


def _group(key: str, group: list[tuple[str, tarfile.TarInfo]], alike: bool) -> list[Members]:
    """alike: others have members of the same names: these are fields (`input.jpg`, `output.txt`),
    where no name in front of a suffix has both a text and a medium."""
    named = any(rest in _TEXTS for rest, _ in group)
    if alike and not named and _are_fields(group):
        fields = Members(key)
        for rest, member in group:
            suffix = rest.rpartition(".")[2]
            fields.add(suffix if suffix in _TEXTS else rest, member)
        return [fields]
    if not named and any(rest.rpartition(".")[2] in _TEXTS for rest, _ in group):
        dotted: dict[str, Members] = {}
        for _, member in group:
            stem, _, rest = member.name.rpartition(".")
            dotted.setdefault(stem, Members(stem)).add(rest.lower(), member)
        return list(dotted.values())
    # Names with dots of their own may stand beside one without: `1.jpg`, `1.txt`, `1.5.jpg`, ...
    suffixes: dict[str, set[str]] = {}
    for rest, _ in group:
        stem, _, suffix = rest.rpartition(".")
        suffixes.setdefault(stem, set()).add(suffix)
    pairs = {stem for stem, found in suffixes.items() if found & _TEXTS and found - _TEXTS} - {""}
    samples = {"": Members(key)}
    for rest, member in group:
        stem, _, suffix = rest.rpartition(".")
        own = stem if stem in pairs else ""
        sample = samples.setdefault(own, Members(member.name.rpartition(".")[0]))
        sample.add(suffix if own else rest, member)
    return [sample for sample in samples.values() if sample.found]


def _are_fields(group: list[tuple[str, tarfile.TarInfo]]) -> bool:
    """Whether each member has a name of its own in front of its suffix, one a text, one not.
    `KEY.info.json` of yt-dlp tells of the file beside it."""
    parts = [rest.rpartition(".") for rest, _ in group]
    texts = [suffix for _, _, suffix in parts if suffix in _TEXTS]
    names = [name for name, _, _ in parts]
    if "info" in names:
        return False
    return len({*names}) == len(names) and 0 < len({*texts}) == len(texts) < len(parts)


def names(path: str) -> Iterator[str]:
    """The names of the members of a local tar, compressed or not, up to where it is damaged."""
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == _GZIP
        with cast(BinaryIO, gzip.open(path)) if packed else open(path, "rb") as file:
            yield from (member.name for _, member in members(file))
    except DAMAGE:
        return


@contextmanager
def open_archive(path: str) -> Iterator[Archive]:
    """A local or remote tar, compressed or not; ShardError where it cannot be opened."""
    with files.open_file(path) as file:
        packed = file.read(2) == _GZIP
        file.seek(0)
        if not files.is_url(path) and not packed:
            yield Archive(file, None)
            return
        # Its members are read where they lie, which needs a plain file.
        with tempfile.TemporaryFile() as local:
            damage = _unpacked(file, local)
            yield Archive(cast(BinaryIO, local), damage)


def _unpacked(file: BinaryIO, local: BinaryIO) -> Exception | None:
    start = file.read(2)
    file.seek(0)
    try:
        if start == _GZIP:
            with gzip.open(file) as inner:
                shutil.copyfileobj(inner, local)
        else:
            shutil.copyfileobj(file, local)
    except (EOFError, OSError, zlib.error) as error:
        return error
    return None
