"""Commentary with times, narrations and transcripts become real-time samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.video import frames_at, probe_video
from tests.data_pipeline.clips import number
from tests.data_pipeline.importers.realtime import FRAME, SILENCE, WATCHED, run, said, write


@pytest.mark.parametrize("indent", [1, None])  # on many lines, on one
def test_ego4ds_narrations_of_each_pass_are_samples(folder: Path, indent: int | None) -> None:
    def narration(second: float, text: str, uid: str) -> dict[str, Any]:
        return {"time": second, "text": text, "_annotation_uid": uid}

    narrations = [
        narration(4.4, "#C C opens the door", "x"),
        narration(2.0, "#C C walks in.", "x"),
        narration(2.0, "#unsure", "x"),
        narration(3.0, "#O A man sits", "y"),
        narration(50.0, "#C C sleeps well", "y"),
        narration(-1.0, "#C C begins", "y"),
    ]
    path = folder / "all_narrations_redacted.json"
    path.write_text(json.dumps({"videos": {"a": {"narrations": narrations}}}, indent=indent))
    (first, second), summary = run(path)
    assert said(first)[1] == (
        WATCHED * 1 + SILENCE + FRAME + SILENCE + FRAME + "C walks in." + WATCHED * 3
        + "C opens the door." + WATCHED + SILENCE
    )  # fmt: skip
    assert said(second)[1].count("A man sits.") == 1
    assert summary.notes == {
        "narrations not in the order of time, sorted": 1,
        "narration without a sentence, left out": 1,
        "narration with a bad time, left out": 1,
        "answer after the clip's end, left out": 1,
    }


WORDS = [[0.2, 0.6, "Here"], [0.6, 1.4, "we"], [1.4, 1.9, "go"], [6.0, 6.5, "again"]]
COMMENTARY = (
    WATCHED + SILENCE + FRAME + "Here" + FRAME + " we go"
    + WATCHED * 5 + "again" + WATCHED + SILENCE
)  # fmt: skip


def livecc(**video: Any) -> list[dict[str, Any]]:
    shown = {"type": "video", "video": "a.mp4"} | video
    return [
        {"role": "user", "content": [shown, {"type": "text", "text": "Comment.", "title": "T"}]},
        {"role": "assistant", "content": [{"type": "text_stream", "text_stream": WORDS}]},
    ]


def test_liveccs_words_are_said_after_the_frame_at_their_end(folder: Path) -> None:
    source = write(folder / "l.jsonl", livecc(video_start=0.0, video_end=9.0), [0, 412])
    (sample,), summary = run(source)
    assert said(sample) == ["Comment.", COMMENTARY]
    assert summary.rejected == {"index_line": 1}


SRT = """\ufeff1\r
00:00:00,200 --> 00:00:01,400\r
<i>Here we</i>\r
\r
2\r
00:00:01,400 --> 00:00:01,900\r
go\r
\r
3\r
00:00:03,000 --> 00:00:04,000\r
[Music]\r
\r
4\r
00:00:06,000 --> 00:00:06,500\r
again"""
VTT = """WEBVTT

00:00.200 --> 00:01.900
Here<00:00:00.600><c> we</c><00:00:01.400><c> go</c>

00:06.000 --> 00:06.500
Here we go
again
"""
WHISPER = {"text": "...", "language": "en", "segments": [
    {"start": 0.2, "end": 6.5, "text": "Here we go again",
     "words": [{"start": s, "end": e, "word": w} for s, e, w in WORDS]},
]}  # fmt: skip


def test_transcripts_beside_a_video_become_the_same_commentary(folder: Path) -> None:
    spoken = []
    for name, text in (("a.en.srt", SRT), ("a.vtt", VTT), ("a.json", json.dumps(WHISPER))):
        path = folder / name
        path.write_bytes(text.encode())
        (sample,), _ = run(folder if name == "a.json" else path)
        spoken.append(said(sample)[1])
        path.unlink()
    assert spoken == [COMMENTARY] * 3  # of .srt the words are spread evenly: 0.8 and 1.4 s


def spoken(sample: dict[str, Any]) -> str:
    """What is said, without frames and silence."""
    return said(sample)[1].replace(FRAME, "").replace(SILENCE, " ").strip()


def test_the_lines_of_a_caption_are_said_one_after_the_other(folder: Path) -> None:
    (folder / "a.srt").write_text(
        "1\n00:00:00, 500 --> 00:00:03, 500\none two\nthree four\n\nfive six\n\n"
        "2\n00:00:04:000 --> 00:00:05:000\nGoal!\n\n3\n00:00:08,000 --> 00:00:09,000\nGoal!\n"
    )
    (sample,), summary = run(folder)
    assert " ".join(spoken(sample).split()) == "one two three four five six Goal! Goal!"
    assert summary.notes == {}


def test_captions_that_roll_are_said_once(folder: Path) -> None:
    (folder / "a.vtt").write_text(
        "WEBVTT\nKind: captions\n\nNOTE by hand\n\n00:01.000 --> 00:02.000\nA a\nB b\nC c\n\n"
        "second\n00:02.000 --> 00:03.000\nB b\nC c\nD d\n\nnot shown\n\n"
        "00:03.000 --> 00:03.010\n \nD d\n \n\n00:04.000 --> 00:05.000\nE e\n\n"
        "00:05.000 --> 00:06.000\nE e\n"
    )
    (sample,), summary = run(folder)
    assert " ".join(spoken(sample).split()) == "A a B b C c D d E e"
    assert summary.notes == {
        "line of a transcript without a time, left out": 1,
        "line shown in two cues, said once": 1,
    }


def test_pieces_of_a_word_stay_together(folder: Path) -> None:
    pieces = (" A", " 25", "-year", "-old", " costs", " $5", ".3", " million")
    words = [{"start": i * 0.5, "end": i * 0.5 + 0.5, "word": w} for i, w in enumerate(pieces)]
    segment = {"start": 0, "end": 4, "text": "", "words": words}
    (folder / "a.json").write_text(json.dumps({"segments": [segment]}))
    (sample,), _ = run(folder)
    assert spoken(sample) == "A 25-year-old costs $5.3 million"


def test_words_far_apart_are_no_pieces_of_one(folder: Path) -> None:
    words = [[0, 1, " Hello"], [2, 3, "World"], [6, 7, " so"], [7.5, 8, "again"], [8, 8.5, " x"],
             [9.2, 9.5, "."]]  # fmt: skip
    (sample,), _ = run(write(folder / "w.jsonl", {"video": "a.mp4", "words": words}))
    assert said(sample)[1] == (
        WATCHED + SILENCE + FRAME + "Hello" + WATCHED + SILENCE + FRAME + "World"
        + WATCHED * 3 + SILENCE + FRAME + "so" + FRAME + " again" + FRAME + " x." + SILENCE
    )  # fmt: skip


def test_a_line_that_two_people_may_have_said_is_told(folder: Path) -> None:
    (folder / "a.srt").write_text(
        "1\n00:00:01,000 --> 00:00:02,000\n- No.\n- No.\n\n"
        "2\n00:00:02,050 --> 00:00:03,000\n- No.\n- Why?\n\n"
        "3\n00:00:03,000 --> 00:00:04,000\n\u4f60\u597d\n<i>\u518d\u89c1</i>\nB b\n"
    )
    (sample,), summary = run(folder)
    assert " ".join(spoken(sample).split()) == "- No. - No. - Why?\u4f60\u597d\u518d\u89c1 B b"
    assert summary.notes["line shown in two cues, said once"] == 1


def test_times_with_a_comma_are_read_and_words_without_any_are_told(folder: Path) -> None:
    record = {"video": "a.mp4", "subtitles": [{"start": "00:01,5", "end": "00:02,0", "text": "hi"}]}
    none = {"video": "a.mp4", "subtitles": [{"start": "one", "end": "two", "text": "hi"}]}
    (sample,), summary = run(write(folder / "a.jsonl", record, none))
    assert spoken(sample) == "hi"
    assert summary.rejected == {"missing_text": 1}


def at_seconds(sample: dict[str, Any]) -> dict[float, str]:
    """What is said after the frame of each second, where something is."""
    _, *pieces = said(sample)[1].replace(SILENCE, "").split(FRAME)
    times = sample["media"][0].get("times", range(len(pieces)))
    return {second: text.strip() for second, text in zip(times, pieces, strict=True) if text}


def test_words_without_times_are_said_in_their_segment(folder: Path) -> None:
    """WhisperX gives numbers no time; the segments have theirs, the flat list has none."""
    segments = [
        {"start": 1.0, "end": 2.0, "text": "in 2014",
         "words": [{"word": "in", "start": 1.0, "end": 2.0}, {"word": "2014"}]},
        {"start": 5.0, "end": 6.0, "text": "7 8", "words": [{"word": "7"}, {"word": "8"}]},
        {"start": 8.0, "end": 9.0, "text": "9 is",
         "words": [{"word": "9"}, {"word": "is", "start": 8.5, "end": 9.0}]},
    ]  # fmt: skip
    flat = [word for segment in segments for word in segment["words"]]  # type: ignore[attr-defined]
    whole = {"segments": segments, "word_segments": flat}
    (folder / "a.json").write_text(json.dumps(whole))
    (sample,), _ = run(folder)
    assert at_seconds(sample) == {2: "in 2014", 6: "7 8", 8: "9", 9: "is"}
    (folder / "a.json").write_text(json.dumps({"word_segments": flat[3:]}))
    (sample,), _ = run(folder)
    assert " ".join(at_seconds(sample).values()) == "8 9 is"
    (folder / "a.json").write_text(json.dumps({"segments": [segments[0], {"text": "so"}]}))
    (sample,), _ = run(folder)
    assert at_seconds(sample) == {2: "in 2014 so"}


def test_the_number_of_a_segment_s_words_is_not_its_words(folder: Path) -> None:
    for count in (2, "two", {"all": 2}):
        segments = [{"start": 1, "end": 2, "text": "hi you", "words": count}]
        (folder / "a.json").write_text(json.dumps({"segments": segments}))
        (sample,), _ = run(folder)
        assert " ".join(at_seconds(sample).values()) == "hi you"


def test_a_list_of_segments_is_a_transcript(folder: Path) -> None:
    """As youtube-transcript-api and many scripts write them: no object around the list."""
    for segments, wanted in (
        ([{"text": "hi", "start": 1.0, "duration": 1.0}], {2: "hi"}),
        ([{"start": 1, "end": 2, "text": " hi"}, {"start": 8, "end": None, "text": " you"}],
         {2: "hi", 8: "you"}),
        ([{"text": "hi you", "start": "0.0", "duration": "4.0"}], {2: "hi", 4: "you"}),
    ):  # fmt: skip
        (folder / "a.json").write_text(json.dumps(segments))
        (sample,), _ = run(folder)
        assert at_seconds(sample) == wanted
    labels = [{"start": 1, "duration": 2, "label": "wave"}]
    for record in (  # of a table
        {"video": "a.mp4", "start": 1, "end": 2, "text": "hi"},
        {"video": "a.mp4", "text": "hi", "segments": labels},
    ):
        (folder / "a.json").write_text(json.dumps([record]))
        assert run(folder)[1].imported == {"video": 1}


def test_a_folder_of_transcripts_has_its_videos_by_a_relative_path(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "a.srt").write_text(SRT)
    monkeypatch.chdir(folder.parent)
    for source in (folder.name, f"./{folder.name}/", f"{folder.name}/a.srt"):
        (sample,), _ = run(Path(source))
        assert said(sample)[1] == COMMENTARY


def test_a_long_commentary_is_cut_into_windows(folder: Path) -> None:
    record = {"video": "a.mp4", "content": [[s, s + 0.5, f"w{s}"] for s in (1, 2, 7, 8)]}
    (first, second), summary = run(write(folder / "w.jsonl", record), window=4)
    assert (
        said(first)[1] == WATCHED * 2 + SILENCE + FRAME + "w1" + FRAME + " w2" + WATCHED + SILENCE
    )
    assert said(second)[1] == WATCHED * 3 + "w7" + FRAME + " w8" + SILENCE
    # Seconds 6 to 9 of the video: its frames 30 to 49.
    assert second["media"][0]["times"] == [0.0, 1.0, 2.0, 3.0]
    clip = second["members"]["0.mp4"]
    assert probe_video(clip).duration == pytest.approx(4.0, abs=0.01)
    shown = [number(frame.permute(1, 2, 0)) for frame in frames_at(clip, [0.0, 1.0, 3.9])]
    assert shown == [30, 35, 49]
    assert summary.imported["realtime"] == 2
