"""The demo's report, of an evaluation of a random model."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from moss_train.config import to_dict
from moss_train.evaluate.suite import evaluate, table, toy_items
from tools.demo.report import contact_sheet, write_report


def test_one_file_holds_the_table_and_all_pictures(model, tmp_path: Path) -> None:
    run = tmp_path / "realtime_sft"
    run.mkdir()
    said: list[str] = []
    result = evaluate(model, toy_items(model, 8, ["realtime_sft"]), said.append)
    sources = ["realtime_sft/text", "realtime_sft/image", "realtime_sft/video"]
    assert said == [f"{source}: 8 samples" for source in sources]
    (run / "evaluation.json").write_text(json.dumps(result.to_dict()))
    stage = replace(model.config.stage, name="realtime_sft")
    (run / "config.yaml").write_text(yaml.safe_dump(to_dict(replace(model.config, stage=stage))))
    lines = [json.dumps({"step": step, "loss": 6.0 / step}) for step in range(1, 20)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    report = write_report(tmp_path, ["realtime_sft"], {"train": 60.0})
    text = report.read_text()
    shown = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(shown) == 3  # losses, a narration, a stream that is asked
    assert all(Image.open(io.BytesIO(base64.b64decode(png))).width > 400 for png in shown)
    assert "http" not in text
    for score in result.scores:
        assert f"<td>{score.metric}<td>{score.value:.3f}" in text
    assert "1.0 minutes in all" in text


def test_all_scores_of_streams_are_there(model) -> None:
    result = evaluate(model, toy_items(model, None, ["realtime_sft"]))
    metrics = {s.metric.strip() for s in result.scores if s.source == "realtime_sft/video"}
    assert metrics == {
        "decision F1", "events spoken within 1 s", "with the right words", "answers mid-stream",
        "false alarms a minute",
    }  # fmt: skip
    assert len(result.timelines) == 10
    assert result.value("realtime_sft/video", "decision F1") <= 1
    assert "realtime_sft/video" in table(result.scores)


def test_a_contact_sheet_shows_frames_in_their_order(live) -> None:
    frames = live[0].encoded.frames[:3, 0]
    sheet = contact_sheet(frames)
    assert sheet.shape == (56, 3 * 57, 3)
    second = frames[1].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(sheet[:, 57 : 57 + 56], second)
