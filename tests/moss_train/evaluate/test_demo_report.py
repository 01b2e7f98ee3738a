"""The demo's page, of an evaluation of a random model."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from data_pipeline.page import render
from data_pipeline.toy.stream import NARRATE
from moss_train.config import to_dict
from moss_train.evaluate.suite import Evaluation, evaluate, table, toy_items
from tests.pages import Page, open_page
from tools.demo.report import strip, write_report

EVENTS = [
    {"type": "response.created", "response_id": "r1", "t_media": 1.0},
    {"type": "response.output_text.delta", "response_id": "r1", "t_media": 1.0, "delta": "It <is>"},
    {"type": "response.done", "response_id": "r1", "t_media": 2.0, "text": "It <is> there."},
]


@pytest.fixture(scope="module")
def result(model) -> Evaluation:
    return evaluate(model, toy_items(model, 8, ["realtime_sft"]))


@pytest.fixture(scope="module")
def demo(model, result: Evaluation, tmp_path_factory) -> Path:
    """A demo's folder as its commands leave it."""
    folder: Path = tmp_path_factory.mktemp("demo")
    run = folder / "realtime_sft"
    run.mkdir()
    (run / "evaluation.json").write_text(json.dumps(result.to_dict()))
    stage = replace(model.config.stage, name="realtime_sft")
    (run / "config.yaml").write_text(yaml.safe_dump(to_dict(replace(model.config, stage=stage))))
    lines = [json.dumps({"step": step, "loss": 6.0 / step}) for step in range(1, 20)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "narration.jsonl").write_text("\n".join(map(json.dumps, EVENTS)) + "\n")
    part = {"name": "train", "command": "torchrun 'a b' & <c>", "seconds": 90.0}
    (folder / "demo.json").write_text(json.dumps([part]))
    return folder


@pytest.fixture(scope="module")
def page(demo: Path) -> Page:
    return open_page(write_report(demo))


def test_scores_commands_and_time_are_those_of_the_files(page: Page, result: Evaluation) -> None:
    shown = [row[:5] for row in page.tables[2]]  # after the narrated clip and the main scores
    for score in result.scores:
        source = score.source.replace("all sources", "realtime_sft, all sources")
        values = [source, score.metric, f"{score.value:.3f}"]
        assert any(row[:3] == values for row in shown), values
    assert page.commands == ["torchrun 'a b' & <c>"]
    assert "1.5 minutes" in page.text
    assert "19 steps" in page.text
    assert page.captions == ["realtime_sft: loss per label"]


def test_what_was_before_is_beside_what_is_after(demo: Path, result: Evaluation) -> None:
    before = result.to_dict()
    before["scores"] = [s | {"value": 0.125} for s in before["scores"][:1]]
    (demo / "before.json").write_text(json.dumps(before))
    page = open_page(write_report(demo))
    (demo / "before.json").unlink()
    assert page.tables[1][0] == [
        "source", "score", "before", "model", "blind", "one frame", "shuffled", "chance", "of",
    ]  # fmt: skip
    assert page.tables[1][1][2:4] == ["0.125", f"{result.scores[0].value:.3f}"]
    assert page.tables[1][-1][2] == ""


def test_the_narrated_clip_has_its_words_under_their_second(page: Page, live) -> None:
    clip = page.tables[0]
    item = next(item for item in live if item.sample.messages[0].content == NARRATE)
    assert clip[0] == ["second", *map(str, range(len(item.encoded.frames)))]
    says = next(row for row in clip if row[0] == "the model says")
    assert says[2] == "It <is> there."
    assert [cell for cell in says[1:] if cell] == ["It <is> there."]
    happens = next(row for row in clip if row[0] == "what happens")
    assert [(s, w) for s, w in enumerate(happens[1:]) if w] == list(item.speech)


def with_pictures(text: str) -> str:
    """Control characters as Unicode's pictures of them: a page shows no others."""
    control = {chr(code): chr(0x2400 + code) for code in range(32)} | {
        "\x7f": "\N{SYMBOL FOR DELETE}"
    }
    return "".join(c if c in "\t\n" else control.get(c, c) for c in text)


def test_a_page_shows_what_html_cannot_hold(tmp_path: Path) -> None:
    (tmp_path / "words.html.jinja").write_text("<table><tr><td>{{ words }}</td></tr></table>")
    page = tmp_path / "words.html"
    page.write_text(render("words.html.jinja", tmp_path, words="a\0b<c>\r\n\x1b\x7f"))
    assert open_page(page).tables == [[["a\N{SYMBOL FOR NULL}b<c>␍\n␛␡"]]]


def test_answers_stand_beside_the_right_ones(page: Page, result: Evaluation) -> None:
    (table,) = (t for t in page.tables if t[0][0] == "stage")
    shown = [sample for sample in result.samples if int(sample.key[-6:]) < 5]  # of each modality
    assert len(shown) >= 11  # five texts, five pictures, and clips that are asked about
    for row, sample in zip(table[1:], shown, strict=True):
        assert row[2:] == [sample.asked, sample.wanted, with_pictures(sample.said)]


def test_a_strip_shows_the_clip_s_frames_and_words(live) -> None:
    item = live[0]
    said = [(1, "It comes."), (1, "It goes."), (3, "Red.")]
    shown = strip(item, {"said": said})
    assert shown.lanes["said"][:5] == ["", "It comes. It goes.", "", "Red.", ""]
    head, data = shown.frames[2].split(",")
    assert head == "data:image/png;base64"
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    np.testing.assert_array_equal(pixels, item.encoded.frames[2, 0].permute(1, 2, 0).numpy())


def test_all_scores_of_streams_are_there(model, live) -> None:
    said: list[str] = []
    result = evaluate(model, toy_items(model, None, ["realtime_sft"]), said.append)
    sources = ["realtime_sft/text", "realtime_sft/image", "realtime_sft/video"]
    assert said == [f"{source}: 10 samples" for source in sources]
    metrics = {s.metric.strip() for s in result.scores if s.source == "realtime_sft/video"}
    asked = {metric for metric in metrics if metric.startswith("time")}  # of the other clips
    assert metrics - asked == {
        "decision F1", "events spoken within 1 s", "with the right words", "answers mid-stream",
        "events F1", "false alarms a minute", "answers exact",
    }  # fmt: skip
    assert len(result.timelines) == len(live) < 10
    assert result.value("realtime_sft/video", "decision F1") <= 1
    assert "realtime_sft/video" in table(result.scores)
