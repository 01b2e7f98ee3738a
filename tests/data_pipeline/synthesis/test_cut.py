"""Where videos are cut, what belongs to them, and the configuration of a synthesis."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.schema import SampleError
from data_pipeline.shards import ShardError
from data_pipeline.synthesis.config import CutConfig, config_from
from data_pipeline.synthesis.cut import clips, find_sources, key_of
from data_pipeline.synthesis.estimate import estimate
from data_pipeline.synthesis.prompts import TEMPLATES, PromptError, load_prompts
from data_pipeline.synthesis.write import write
from tests.data_pipeline.clips import every, video

SIZES = CutConfig(clip=10, shortest=4, window=2)


def scenes(path: Path) -> Path:
    """24 s in three scenes, which begin at 7 s and 16 s."""
    return video(path, [0.0, 7.0, 16.0], stays=8.0, coding={"g": "1"})


def spans(path: Path, config: CutConfig) -> list[tuple[int, int]]:
    (source,) = find_sources(str(path))
    return [(clip.start, clip.end) for clip in clips(source, path.read_bytes(), config, [])]


def test_a_long_video_is_cut_where_its_picture_changes(tmp_path: Path) -> None:
    assert spans(scenes(tmp_path / "a.mp4"), SIZES) == [(0, 6), (7, 15), (16, 23)]


def test_it_is_rather_cut_between_words(tmp_path: Path) -> None:
    plain = video(tmp_path / "a.mp4", [0.0], stays=14.0)
    (tmp_path / "a.srt").write_text(
        "1\n00:00:00,000 --> 00:00:05,900\nwords all the time\n\n"
        "2\n00:00:07,500 --> 00:00:13,000\nand again\n"
    )
    assert spans(plain, SIZES) == [(0, 5), (6, 13)]
    (source,) = find_sources(str(plain))
    first, second = clips(source, plain.read_bytes(), SIZES, [])
    assert (first.speech(0, 5), second.speech(0, 7)) == ("words all the time", "and again")


def test_an_estimate_counts_the_videos_that_a_run_takes_and_the_others(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4", every(1.0, 6), stays=0.2)  # 5.2 s: frames at 0, 1, ... 5
    video(tmp_path / "b.mp4", every(1.0, 5), stays=0.2)
    (tmp_path / "c.mp4").write_bytes(b"no video")
    config, sources = config_from({"cut": {"shortest": 6}}), find_sources(str(tmp_path))
    head, *_ = estimate(sources, config, load_prompts(None)).lines(config)
    assert head.startswith("estimate: 1 videos, 5 s, 1 clips; 2 videos left out: shorter than")
    first, second = (Path(source.path).read_bytes() for source in sources[:2])
    assert len(clips(sources[0], first, config.cut, [])) == 1
    with pytest.raises(SampleError, match="less than cut"):
        clips(sources[1], second, config.cut, [])


def test_what_of_a_transcript_is_left_out_is_counted(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", [0.0], stays=5.0)
    record = {"segments": [{"start": 0, "end": 1, "text": "good"},
                           {"start": 2, "end": "??", "text": "bad"}]}  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(record))
    sources = find_sources(str(path))
    notes: list[str] = []
    (clip,) = clips(sources[0], path.read_bytes(), SIZES, notes)
    assert (clip.speech(0, 4), notes) == ("good", ["word with a bad time, left out"])
    outcome = {"fault": ["too_short", "x"], "clips": [], "notes": notes}
    for _ in range(2):  # the second one is read from what the first has written
        written = write(tmp_path, sources, lambda _: outcome, config_from({}))
        assert written.notes == {"word with a bad time, left out": 1}


def test_each_second_has_its_picture_and_a_short_video_is_an_error(tmp_path: Path) -> None:
    (source,) = find_sources(str(video(tmp_path / "a.mp4", every(0.5, 9))))
    (clip,) = clips(source, Path(source.path).read_bytes(), SIZES, [])
    assert (clip.start, clip.end, len(set(clip.pictures))) == (0, 4, 5)
    with pytest.raises(SampleError, match="too_short"):
        clips(source, Path(source.path).read_bytes(), CutConfig(shortest=6), [])


def test_what_lies_beside_a_video_belongs_to_it(tmp_path: Path) -> None:
    for name in ("x/a.mp4", "x/a.en.vtt", "x/a.txt", "y/a.mp4", "b.c.mkv", "b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b".")
    found = {source.name: source for source in find_sources(str(tmp_path))}
    assert sorted(found) == ["b.c", "x/a", "y/a"]
    assert (found["x/a"].transcript or "").endswith("a.en.vtt")
    assert (found["x/a"].about or "").endswith("x/a.txt")
    assert found["y/a"].transcript is found["y/a"].about is found["b.c"].about is None
    keys = {key_of(name) for name in (*found, "x_a", "b_c")}
    assert len(keys) == 5
    assert not any("." in key or "/" in key for key in keys)
    with pytest.raises(ShardError, match="no videos"):
        find_sources(str(tmp_path / "b.txt"))


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"endpoint": {"concurrency": 0}}, r"^endpoint.concurrency=0: must be greater than 0"),
        ({"endpoint": {"json_form": "xml"}}, "endpoint.json_form=xml: choose one of auto"),
        ({"write": {"roles": ["commentary", "song"]}}, "write.roles=song: choose of fire_once"),
        ({"cut": {"clip": 5, "shortest": 9}}, "cut.shortest=9: must be at most cut.clip"),
        ({"check": {"lead": 5, "most_votes": 4}}, "check.most_votes=4: must be at least"),
        ({"output": {"budget": 3.0}}, "output.budget: needs output.price_in"),
        ({"output": {"cost": 3.0}}, "output.cost: is not a field"),
        ({"outputs": {}}, "outputs: is not a group"),
    ],
)
def test_a_wrong_configuration_is_named_before_anything_is_sent(values: dict, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        config_from(values)


def test_the_server_must_be_given() -> None:
    with pytest.raises(ValueError, match=r"endpoint\.model: is missing"):
        config_from({}).check_endpoint()
    with pytest.raises(ValueError, match=r"endpoint\.url=here: must be http"):
        config_from({"endpoint": {"url": "here", "model": "m"}}).check_endpoint()


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("roles:\n", "parts:\n", "roles.fire_once: is not a text"),
        ("say:\n", "tell:\n", "say: needs a task"),
        ("type: boolean", "type: bool", "confirm.schema: "),
        ("system: |", "system: [", "cannot be read"),
    ],
)
def test_a_template_that_misses_something_says_what(
    tmp_path: Path, old: str, new: str, error: str
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(TEMPLATES.read_text().replace(old, new, 1))
    with pytest.raises(PromptError, match=f"own.yaml: {error}"):
        load_prompts(own)
