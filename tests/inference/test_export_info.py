"""What an export says it was trained for, by its prompt form or, if it is older, by its stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inference.export_info import ExportError, read_export_info, weights_of
from tests.inference.tiny import save_tiny


def export(folder: Path, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "form", "question", "watches"),
    [
        ({"moss_stage": "cooking", "moss_prompt_form": "realtime"}, "realtime", "chat", True),
        ({"moss_stage": "cooking", "moss_prompt_form": "pretrain"}, "pretrain", "pretrain", False),
        ({"moss_stage": "realtime_sft", "moss_prompt_form": "chat"}, "chat", "chat", False),
        ({"moss_stage": "pt2"}, "pretrain", "pretrain", False),
        ({"moss_stage": "sft"}, "chat", "chat", False),
        ({"moss_stage": "realtime_sft", "moss_prompt_form": None}, "realtime", "chat", True),
        ({"moss_stage": "cooking"}, None, "chat", None),
        ({"model_type": "mllama"}, None, "chat", None),
    ],
)
def test_the_form_of_an_export(
    tmp_path: Path, config: dict[str, Any], form: str | None, question: str, watches: bool | None
) -> None:
    info = read_export_info(export(tmp_path, **config))
    assert (info.prompt_form, info.question_form, info.watches) == (form, question, watches)
    assert info.stage == config.get("moss_stage")


def test_the_model_writes_its_form_into_the_folder(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, moss_stage="cooking", moss_prompt_form="realtime")
    assert read_export_info(folder).watches is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no .*config.json: give the folder of an export"),
        ("[1, 2]", "config.json: is not a JSON object"),
        ("{", "config.json: is not a JSON object"),
        ('{"moss_prompt_form": "poem"}', "moss_prompt_form 'poem', allowed: pretrain, chat, real"),
    ],
)
def test_what_is_not_an_export_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ExportError, match=message):
        read_export_info(tmp_path)


@pytest.mark.parametrize("manifest", ['{"files": ["a.safetensors"]}', '{"files": {"a": 1}}', "[]"])
def test_a_manifest_of_another_program_says_nothing_of_the_weights(
    tmp_path: Path, manifest: str
) -> None:
    (tmp_path / "a.safetensors").write_bytes(bytes(100))
    alone = weights_of(tmp_path)
    (tmp_path / "manifest.json").write_text(manifest)
    assert weights_of(tmp_path) == alone
    (tmp_path / "a.safetensors").write_bytes(b"\1" + bytes(99))
    assert weights_of(tmp_path) != alone


def test_weights_that_are_links_to_nothing_are_named(tmp_path: Path) -> None:
    (export(tmp_path) / "model.safetensors").symlink_to(tmp_path / "blob")
    with pytest.raises(ExportError, match=r"model\.safetensors: No such file or directory"):
        read_export_info(tmp_path)
