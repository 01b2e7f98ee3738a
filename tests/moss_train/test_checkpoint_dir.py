"""What is on disk of a checkpoint, in this version's names and in an earlier one's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from moss_train.checkpoint_dir import read_run
from moss_train.compose import load_config
from moss_train.config import from_dict, to_dict


def test_a_run_of_an_earlier_version_is_read_under_today_s_names(tmp_path: Path) -> None:
    config = load_config("sft", model="tiny", run={"dir": str(tmp_path)})
    config = replace(config, model=replace(config.model, tokens_before_first_frame="attend_all"))
    saved = to_dict(config)
    saved["model"]["blind_rows"] = saved["model"].pop("tokens_before_first_frame")
    run = {"step": 3, "samples": 6, "layout": {}, "config": saved}
    (tmp_path / "run.json").write_text(json.dumps(run))

    assert read_run(tmp_path)["config"] == to_dict(config)
    assert from_dict(saved) == config
    assert "blind_rows" in saved["model"]
