"""Finds the media that records name: by their paths, by the ends of them, in tars.

A path is tried as it stands. Then, below the root of the media, each end of it is tried, the
longest first (`/home/someone/data/clips/1.mp4`: `data/clips/1.mp4`, `clips/1.mp4`, `1.mp4`); as a
file, then as a member of a tar: the root itself, or tars that lie in it. A member's name may begin
with more folders, but not with others: `b/1.mp4` is not `a/1.mp4`. They stand before all of a
relative path: `vg/images/1.jpg`, whose tar is not there, is not `gqa/images/1.jpg`.
"""

from __future__ import annotations

import os
import tarfile
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Literal
from urllib.parse import unquote

from data_pipeline import files
from data_pipeline.importers.archive import members
from data_pipeline.importers.draft import Draft, Medium, TarMember
from data_pipeline.schema import MediaType, SampleError
from data_pipeline.shards import ShardError
from data_pipeline.tar_members import extents_of

_SUFFIXES: dict[MediaType, frozenset[str]] = {
    "image": files.IMAGE_SUFFIXES,
    "video": files.VIDEO_SUFFIXES,
}

# Archives in which no media are searched.
_PACKED = (".zip", ".7z", ".rar", ".tgz", ".txz", ".tbz2",
           ".tar.gz", ".tar.zst", ".tar.xz", ".tar.bz2")  # fmt: skip
_LINKS = 10  # links in a tar, each of which leads to the next, at most
# An accent may be a sign of its own, as macOS writes names, or part of its letter.
_SPELLINGS: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")


class Finder:
    """The media below one root; a URL is not searched."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._searched = not files.is_url(root)

    def placed(self, draft: Draft) -> Draft | SampleError:
        """The draft with its media where they are; one that is nowhere keeps its path.

        A SampleError for a name that different files of several tars have, and for a medium that
        may be in an archive which is not searched.
        """
        if not self._searched:
            return draft
        try:
            media = [self._found(medium) for medium in draft.media]
        except SampleError as error:
            return error
        if all(new is old for new, old in zip(media, draft.media, strict=True)):
            return draft
        notes = draft.notes
        for new, old in zip(media, draft.media, strict=True):
            if isinstance(new.content, TarMember):
                notes += ("medium in a tar",)
            elif new is not old and new.content == unquote(str(old.content)):
                notes += ("medium found by its path without %XX",)
            elif new is not old and not str(new.content).startswith(str(old.content)):
                notes += ("medium found by the end of its path",)
        return replace(draft, media=media, notes=notes)

    def _found(self, medium: Medium) -> Medium:
        placed, path = self._place(medium), medium.content
        if placed is not medium or not isinstance(path, str) or files.is_url(path):
            return placed
        if not os.path.exists(path) and self._packed:
            detail = f"{path}: No such file; {self._packed} is not searched: unpack it"
            raise SampleError("missing_file", detail)
        return placed

    def _place(self, medium: Medium) -> Medium:
        path = medium.content
        if not isinstance(path, str) or files.is_url(path) or os.path.exists(path):
            return medium
        foreign = not path.startswith(self._root.rstrip("/") + "/") and path.startswith("/")
        ends = [*_ends(path.removeprefix(self._root.rstrip("/") + "/"))]
        for end in ends:
            for spelt in dict.fromkeys(unicodedata.normalize(form, end) for form in _SPELLINGS):
                found = os.path.join(self._root, spelt)
                if os.path.isfile(found):
                    return replace(medium, content=found, suffix=files.suffix(found))
            if member := self._member(end, end == ends[0] or (foreign and "/" in end)):
                return replace(medium, content=member, suffix=files.suffix(end))
        if files.suffix(path) not in _SUFFIXES[medium.type]:  # an id, of YouTube say
            for suffix in sorted(_SUFFIXES[medium.type]):
                for start in (path, *(os.path.join(self._root, end) for end in ends)):
                    if os.path.isfile(start + suffix):
                        return replace(medium, content=start + suffix, suffix=suffix)
                if ends and (member := self._member(ends[0] + suffix, True)):
                    return replace(medium, content=member, suffix=suffix)
        plain = unquote(path)
        if plain == path:
            return medium
        placed = self._place(replace(medium, content=plain, suffix=files.suffix(plain)))
        there = isinstance(placed.content, TarMember) or os.path.exists(str(placed.content))
        return placed if there else medium

    @cached_property
    def _packed(self) -> str | None:
        """An archive in the root that is not searched."""
        if not os.path.isdir(self._root):
            return None
        names = sorted(entry.name for entry in os.scandir(self._root) if entry.is_file())
        return next((name for name in names if name.lower().endswith(_PACKED)), None)

    def _member(self, name: str, enough: bool) -> TarMember | None:
        """The member of this name or, where that is `enough`, the only one whose name ends so: of
        a foreign path nobody knows where the set begins, and a folder and a name are enough."""
        name = files.composed(name)
        whole, by_ends = self._members
        if name not in whole:
            name = (enough and by_ends.get(name)) or ""
        if name not in whole:
            return None
        first, *others = whole[name]
        for other in others:
            if other.size != first.size or other.read() != first.read():
                raise SampleError(
                    "ambiguous_media",
                    f"{name} of {first.tar} and of {other.tar} differ: keep one of them",
                )
        return first

    @cached_property
    def _members(self) -> tuple[dict[str, list[TarMember]], dict[str, str | None]]:
        """The members of all tars by their whole names; and these names by their ends, None where
        several end so. Read when the first medium is not a file."""
        whole: dict[str, list[TarMember]] = {}
        by_ends: dict[str, str | None] = {}
        for tar in _tars(self._root):
            try:
                for name, member in _members_of(tar):
                    whole.setdefault(files.composed(name), []).append(member)
            except tarfile.TarError as error:
                raise ShardError(f"{tar}: {error}: media are read from tars that are whole and not "
                                 f"compressed: unpack it (tar -xf {tar})") from None  # fmt: skip
        for name in whole:
            for end in [*_ends(name)][1:]:
                before = by_ends.get(end, name)
                same = before is not None and whole[before] == whole[name]  # by a link
                by_ends[end] = name if same else None
        return whole, by_ends


def _tars(root: str) -> list[str]:
    if os.path.isfile(root):
        return [root]
    if not os.path.isdir(root):
        return []
    return sorted(entry.path for entry in os.scandir(root) if entry.name.endswith(".tar"))


def _members_of(tar: str) -> Iterator[tuple[str, TarMember]]:
    """The files in a tar by their names; a link to one is the same file under another name."""
    there: dict[str, TarMember] = {}
    links: dict[str, str] = {}
    with open(tar, "rb") as file:
        for _, member in members(file):
            name = member.name.removeprefix("./")
            if member.isfile():
                extents = extents_of(member)
                there[name] = TarMember(tar, name, member.offset_data, member.size, extents)
                yield name, there[name]
            elif member.islnk():
                links[name] = os.path.normpath(member.linkname)
            elif member.issym():
                links[name] = os.path.normpath(os.path.join(os.path.dirname(name), member.linkname))
    for name in links:
        target = name
        for _ in range(_LINKS):
            target = links.get(target, target)
        if target in there:
            yield name, there[target]


def _ends(path: str) -> Iterator[str]:
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    for first in range(len(parts)):
        yield "/".join(parts[first:])
