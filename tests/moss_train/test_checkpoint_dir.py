"""What is on disk of a checkpoint, in this version's names and in an earlier one's."""

from __future__ import annotations

import binascii
import json
from dataclasses import replace
from pathlib import Path

import pytest

from moss_train.checkpoint_dir import (
    find,
    flaw,
    listed_files,
    read_run,
    set_aside,
    write_complete,
)
from moss_train.compose import load_config
from moss_train.config import ConfigError, from_dict, to_dict
from moss_train.resume import find_resume
from moss_train.storage import StorageError


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


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Path, Path]:
    """Two whole checkpoints of a run, the older one first."""
    config = to_dict(load_config("sft", model="tiny", run={"dir": str(tmp_path)}))
    made = []
    for step in (1, 2):
        path = tmp_path / "checkpoints" / f"step_{step:08d}"
        path.mkdir(parents=True)
        run = {"step": step, "samples": step, "layout": {}, "config": config}
        (path / "run.json").write_text(json.dumps(run))
        (path / "common.pt").write_bytes(b"")
        (path / "__0_0.distcp").write_bytes(b"weights" * 1000)
        write_complete(path)
        made.append(path)
    return made[0], made[1]


def test_complete_json_has_the_size_and_the_crc32_of_each_file(checkpoints) -> None:
    files = listed_files(checkpoints[0])
    content = b"weights" * 1000
    assert files["__0_0.distcp"] == {"size": 7000, "crc32": f"{binascii.crc32(content):08x}"}
    assert files.keys() == {"__0_0.distcp", "run.json", "common.pt"}


def test_checkpoints_of_earlier_versions_have_sizes_alone(checkpoints) -> None:
    older = checkpoints[0]
    sizes = {name: about["size"] for name, about in listed_files(older).items()}
    (older / "complete.json").write_text(json.dumps({"files": sizes}))
    assert flaw(older) is None
    assert listed_files(older)["__0_0.distcp"] == {"size": 7000}


def test_a_run_whose_checkpoints_are_all_damaged_begins_again_only_when_told(
    checkpoints, tmp_path
) -> None:
    config = load_config("sft", model="tiny", run={"dir": str(tmp_path)})
    older, newer = checkpoints
    (older / "common.pt").unlink()
    with pytest.raises(ConfigError) as caught:
        find_resume(config, {newer: "__0_0.distcp: other bytes"})
    assert caught.value.problems == [
        f"checkpoint {older}: is damaged: {older}/common.pt is not there",
        f"checkpoint {newer}: is damaged: __0_0.distcp: other bytes",
        f"run.dir={tmp_path}: none of its checkpoints can be loaded: bring one back, or begin at "
        "step 1 with trainer.start_over=true, which renames them to .damaged_*",
    ]
    again = replace(config, trainer=replace(config.trainer, start_over=True))
    assert find_resume(again, {newer: "__0_0.distcp: other bytes"}) is None


def test_a_storage_that_fails_is_tried_again_and_is_no_damage(checkpoints, caplog) -> None:
    older, newer = checkpoints
    (newer / "common.pt").unlink()
    (newer / "common.pt").symlink_to("common.pt")  # ELOOP, whatever is asked of it
    with pytest.raises(StorageError, match=r"step_00000002: cannot be read, 4 times \(.*symbolic"):
        find(older.parent.parent)
    assert len(caplog.messages) == 3
    assert all("again in" in message for message in caplog.messages)


def test_a_damaged_checkpoint_gets_another_name_and_nothing_is_deleted(checkpoints) -> None:
    older, _ = checkpoints
    set_aside(older)
    older.mkdir()
    set_aside(older)
    names = {path.name for path in older.parent.iterdir()}
    assert names == {".damaged_step_00000001", ".damaged_step_00000001.2", "step_00000002"}
    assert (older.parent / ".damaged_step_00000001" / "__0_0.distcp").stat().st_size == 7000
