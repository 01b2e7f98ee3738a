"""What is on disk of a run's checkpoints, read without megatron (so before the job starts).

A checkpoint is a folder `checkpoints/step_00000100` of a run: megatron's distributed checkpoint
(weights, optimizer, random state), `run.json` (configuration, step, layout, versions, tokenizer),
`streams.json` (where each data stream stands) and, written last, `complete.json` (every file with
its size). `checkpoints/latest` names the newest. What has no sound `complete.json` is not loaded.
An imported one (tools.convert_checkpoint) has the same form, and `weights_only` in its run.json.
"""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

from data_pipeline.prompts import STAGE_FORMS
from moss_train.config import ConfigError, present_names
from moss_train.log import log


def checkpoints_folder(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def is_complete(path: Path) -> bool:
    """True where every file that `complete.json` lists is there with its size, and readable."""
    try:
        files = json.loads((path / "complete.json").read_text())["files"]
        read_run(path)
        read_streams(path)
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def write_complete(path: Path) -> None:
    """Writes `complete.json`, the last file of a checkpoint, and brings it to the disk."""
    files = {
        str(file.relative_to(path)): file.stat().st_size
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
    with (path / "complete.json").open("w") as out:
        json.dump({"files": files}, out, indent=1)
        out.flush()
        os.fsync(out.fileno())


def find(where: Path) -> Path | None:
    """The newest complete checkpoint of a run folder (or `where` itself, if it is one).

    Damaged ones are passed over with a warning.
    """
    folder = checkpoints_folder(where)
    if not folder.is_dir():
        return where if is_complete(where) else None
    candidates = sorted(folder.glob("step_*"), reverse=True)
    for path in candidates:
        if is_complete(path):
            return path
        log.warning("checkpoint %s is damaged or half written: trying the one before", path)
    return None


def read_run(path: Path) -> dict[str, Any]:
    """`run.json` of a checkpoint: config, step, samples, layout, versions, tokenizer's identity.

    Raises:
        ConfigError: `path` holds no readable one.
    """
    try:
        run = json.loads((path / "run.json").read_text())
        if not {"step", "samples", "layout", "config"} <= run.keys():
            raise ValueError("it is not a run's")
        config = present_names(run["config"])
        if run.get("weights_only") and config["stage"]["prompt"] == "pretrain":
            # Imports of earlier versions have a stage's name alone; the rest are defaults.
            config["stage"]["prompt"] = STAGE_FORMS.get(config["stage"]["name"], "pretrain")
        return {**run, "config": config}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError([f"checkpoint {path}: cannot read run.json ({error})"]) from None


def read_streams(path: Path) -> list[bytes]:
    """State of every data stream of the job that saved `path`, in global order."""
    return [base64.b64decode(text) for text in json.loads((path / "streams.json").read_text())]
