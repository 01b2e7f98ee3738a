"""Plain text that says where it is from, and captions of pictures that say where these are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.data_pipeline.importers.realtime import run, said


@pytest.mark.parametrize(
    ("column", "place"),
    [
        ("URL", "https://example.org/news"),
        ("Path", "src/a.py"),
        ("url", "https://example.org/news"),  # C4, FineWeb
        ("url", "https://example.org/index.html?page=2"),
        ("path", "src/a.py"),
    ],
)
def test_plain_text_may_say_where_it_is_from(column: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/r.jsonl").write_text(json.dumps({"text": "News.", column: place}))
    (sample,), summary = run(tmp_path / "set/r.jsonl")
    assert (said(sample)[1], sample["members"]) == ("News.", {})
    assert summary.notes == {f"unused field {column}": 1}


def test_a_path_without_a_suffix_is_no_origin_of_a_text(tmp_path: Path) -> None:
    """Else the captions of pictures that cannot be found would be learned as texts."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set/r.jsonl").write_text(json.dumps({"text": "A cat.", "path": "clips/0001"}))
    samples, summary = run(tmp_path / "set/r.jsonl")
    assert (samples, summary.rejected) == ([], {"unknown_media": 1})


def test_the_first_records_say_whether_a_url_is_a_texts_or_a_pictures(tmp_path: Path) -> None:
    """A page may be called like a picture, and a picture's URL may have no suffix."""
    (tmp_path / "set").mkdir()
    Image.new("RGB", (12, 8), "red").save(tmp_path / "set/red.jpg")
    page, shown = (
        {"text": "News.", "url": "https://example.org/a"},
        {"text": "R.", "url": "red.jpg"},
    )
    (tmp_path / "set/pages.jsonl").write_text("\n".join(map(json.dumps, [shown, *[page] * 9])))
    (tmp_path / "set/shown.jsonl").write_text("\n".join(map(json.dumps, [page, *[shown] * 9])))
    samples, summary = run(tmp_path / "set/pages.jsonl")
    assert [said(sample)[1] for sample in samples if not sample["members"]] == ["News."] * 9
    assert summary.notes == {"unused field url": 9}
    samples, summary = run(tmp_path / "set/shown.jsonl")
    assert [said(sample)[1] for sample in samples if sample["members"]] == ["R."] * 9
    assert summary.rejected == {"unknown_media": 1}
