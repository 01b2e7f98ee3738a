"""What is on disk of a run's checkpoints, read without megatron (so before the job starts).

A checkpoint is a folder `checkpoints/step_00000100` of a run: megatron's distributed checkpoint
(weights, optimizer, random state), `run.json` (configuration, step, position in the data, layout,
versions, tokenizer) and, written last, `complete.json` (every file with its size and checksum).
`checkpoints/latest` names the newest. What has no sound `complete.json` is not loaded; sizes are
compared here, checksums by the job (train/start.py).
An imported one (tools.convert_checkpoint) has the same form, and `weights_only` in its run.json.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from data_pipeline.loader.state import OrderState
from data_pipeline.prompts import STAGE_FORMS
from moss_train.config import ConfigError, present_names
from moss_train.log import log
from moss_train.storage import NOT_THERE, describe_files, patiently


def checkpoints_folder(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def is_complete(path: Path) -> bool:
    """True where every file that `complete.json` lists is there with its size, and readable."""
    return flaw(path) is None


def flaw(path: Path) -> str | None:
    """What is missing or wrong of a checkpoint, by the names and sizes of its files.

    Raises:
        StorageError: the storage does not answer.
    """
    try:
        return patiently(lambda: _flaw(path), path)
    except NOT_THERE as error:
        return f"{error.filename} is not there"


def _flaw(path: Path) -> str | None:
    try:
        for name, about in listed_files(path).items():
            size = (path / name).stat().st_size
            if size != about["size"]:
                return f"{name} has {size} bytes, not {about['size']}"
        read_run(path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({error})"
    return None


def listed_files(path: Path) -> dict[str, dict[str, Any]]:
    """What `complete.json` says of each file: `size` in bytes, `crc32` (storage.checksum); those of
    earlier versions have no checksums.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: it cannot be read.
    """
    files = json.loads((path / "complete.json").read_text())["files"]
    return {
        name: about if isinstance(about, dict) else {"size": about} for name, about in files.items()
    }


def write_complete(path: Path, described: dict[str, dict[str, Any]] | None = None) -> None:
    """Writes `complete.json`, the last file of a checkpoint, and brings it to the disk.

    described: size and checksum of each file whose writer has them; others are read.
    """
    described = described or {}
    unknown = (
        file
        for file in path.rglob("*")
        if file.is_file() and str(file.relative_to(path)) not in described
    )
    files = dict(sorted({**described, **describe_files(path, unknown)}.items()))
    with (path / "complete.json").open("w") as out:
        json.dump({"files": files}, out, indent=1)
        out.flush()
        os.fsync(out.fileno())


def steps_in(folder: Path) -> list[Path]:
    """The checkpoints of a run's folder of them, whole or not, the oldest first; [] without one.

    Raises:
        StorageError: the storage does not answer.
    """
    try:
        found = patiently(lambda: [*folder.iterdir()], folder)
    except NOT_THERE:
        return []
    return sorted(path for path in found if path.name.startswith("step_"))


def find(where: Path, damaged: Collection[Path] = ()) -> Path | None:
    """The newest complete checkpoint of a run folder (or `where` itself, if it is one).

    Damaged ones are passed over with a warning; those in `damaged` without.

    Raises:
        StorageError: the storage does not answer.
    """
    folder = checkpoints_folder(where)
    if not folder.is_dir():
        return where if where not in damaged and is_complete(where) else None
    for path in reversed(steps_in(folder)):
        if path in damaged:
            continue
        wrong = flaw(path)
        if wrong is None:
            return path
        log.warning("checkpoint %s is damaged: %s: trying the one before", path, wrong)
    return None


def set_aside(path: Path) -> None:
    """Renames a damaged checkpoint: `.damaged_NAME`, which nothing reads and nothing deletes."""
    names = (f".damaged_{path.name}{end}" for end in ("", *(f".{n}" for n in range(2, 1000))))
    target = next(new for name in names if not (new := path.with_name(name)).exists())
    path.rename(target)
    log.warning("%s is damaged: it is %s now", path, target.name)


def read_run(path: Path) -> dict[str, Any]:
    """`run.json` of a checkpoint: config, step, samples, position in the data, layout, versions,
    tokenizer's identity.

    Raises:
        ConfigError: `path` holds no readable one.
        StorageError: the storage does not answer.
    """
    try:
        run = json.loads(patiently((path / "run.json").read_text, path))
        if not {"step", "samples", "layout", "config"} <= run.keys():
            raise ValueError("it is not a run's")
        if run.get("data_order") is not None:
            OrderState.from_dict(run["data_order"])
        config = present_names(run["config"])
        if run.get("weights_only") and config["stage"]["prompt"] == "pretrain":
            # Imports of earlier versions have a stage's name alone; the rest are defaults.
            config["stage"]["prompt"] = STAGE_FORMS.get(config["stage"]["name"], "pretrain")
        return {**run, "config": config}
    except (*NOT_THERE, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError([f"checkpoint {path}: cannot read run.json ({error})"]) from None
