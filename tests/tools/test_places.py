"""The headers of tars are read as tarfile reads them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from tools.data.places import file_places

NAMES = {
    "plain": ["a.json", "a.0.jpg"],
    "folders": ["d/" + "x" * 90 + "/a.json", "/".join(["long"] * 40) + "/b.json"],
    "long": ["y" * 180 + ".json"],
    "not ASCII": ["\u00e9\u4e2d.json", "b.json"],
}


def made(path: Path, names: list[str], form: int) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        tar.addfile(kind("folder", tarfile.DIRTYPE))
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = (0, 1, 511, 512, 513)[number % 5]
            tar.addfile(member, io.BytesIO(b"x" * member.size))
        tar.addfile(kind("link", tarfile.SYMTYPE))
    return path


def kind(name: str, of: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = of, "a.json"
    return member


def by_tarfile(path: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(path, "r:") as tar:
        return [(one.name, one.offset_data, one.size) for one in tar if one.isfile()]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_names_and_places_are_those_of_tarfile(names: list[str], form: int, tmp_path: Path) -> None:
    if form == tarfile.USTAR_FORMAT and len(names[0]) == 185:
        names = names[:0]  # ustar has no such names
    path = made(tmp_path / "a.tar", names, form)
    with path.open("rb") as file:
        assert file_places(file) == by_tarfile(path)


def test_damage_is_tarfiles_to_judge(tmp_path: Path) -> None:
    data = made(
        tmp_path / "a.tar", ["a", "b", "c", "d", "e"] * 20, tarfile.USTAR_FORMAT
    ).read_bytes()
    (tmp_path / "empty.tar").write_bytes(b"")
    cuts = {
        "cut": data[:700],
        "zeros": data[:1024],
        "short": data[:100],
        "empty": b"",
        "garbage": data[:2048] + b"?" * 512 + data[2560:],
        "sum": data[:530] + b"!" + data[531:],
    }
    for name, damaged in cuts.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(damaged)
        try:
            expected: object = by_tarfile(path)
        except tarfile.TarError as error:
            expected = type(error)
        with path.open("rb") as file:
            try:
                found: object = file_places(file)
            except tarfile.TarError as error:
                found = type(error)
        assert found == expected, name
