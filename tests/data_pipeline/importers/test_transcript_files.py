"""What programs leave beside a video: the same words in several files, and files without words."""

from __future__ import annotations

import json
from pathlib import Path

from data_pipeline.importers.forms import SourceOptions, open_source
from tests.data_pipeline.importers.realtime import FRAME, SILENCE, run, said

SRT = "1\n00:00:01,000 --> 00:00:02,000\nhello there\n"
VTT = "WEBVTT\n\n00:01.000 --> 00:02.000\nhello there\n"
WORDS = [{"word": " hello", "start": 1.0, "end": 1.8}, {"word": " there", "start": 2.2, "end": 2.8}]
SEGMENT = {"start": 1.0, "end": 2.8, "text": " hello there", "words": WORDS}
WHISPER = {"text": " hello there", "language": "en", "segments": [SEGMENT]}
INFO = {"id": "x", "webpage_url": "https://example.org", "chapters": [{"start_time": 0}]}


def words(folder: Path) -> list[list[str]]:
    """What is said in each second, sample by sample."""
    samples, summary = run(folder)
    assert not summary.rejected
    return [said(sample)[-1].replace(SILENCE, "").split(FRAME)[1:] for sample in samples]


def test_whispers_files_of_one_video_are_one_sample(folder: Path) -> None:
    for name, text in (("a.srt", SRT), ("a.vtt", VTT), ("a.json", json.dumps(WHISPER))):
        (folder / name).write_text(text)
    (folder / "a.tsv").write_text("start\tend\ttext\n1000\t2000\thello there\n")
    timed = [["", "", "hello", " there"]]  # the times of the words, which only .json has
    assert [one[:4] for one in words(folder)] == timed
    left = open_source(str(folder), SourceOptions(), folder.parent / "out").unread
    assert [Path(path).name for path in left] == ["a.srt", "a.tsv", "a.vtt"]
    for broken in ('{"segments": [', json.dumps({"text": "", "segments": []})):
        (folder / "a.json").write_text(broken)
        assert [one[:4] for one in words(folder)] == [["", "", "hello there", ""]]


def test_languages_of_one_video_are_samples_and_its_description_is_none(folder: Path) -> None:
    (folder / "a.en.vtt").write_text(VTT)
    (folder / "a.de.vtt").write_text(VTT.replace("hello there", "guten Tag"))
    (folder / "a.info.json").write_text(json.dumps(INFO))
    assert [one[2] for one in words(folder)] == ["guten Tag", "hello there"]
    left = open_source(str(folder), SourceOptions(), folder.parent / "out").unread
    assert [Path(path).name for path in left] == ["a.info.json"]
