"""What a run folder says of its run: config.yaml, and run.json with the configuration, versions,
commit, tokenizer, layout and parameter counts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.atomic import write_atomically
from data_pipeline.tokenizer_identity import identify
from moss_train import hardware
from moss_train.config import Config, to_dict
from moss_train.trained_tokenizer import KEY

RUN_FILE, CONFIG_FILE = "run.json", "config.yaml"
PACKAGES = (
    "torch", "megatron-core", "megatron-energon", "numpy", "av", "tokenizers", "hydra-core",
    "transformer-engine", "flash-attn",
)  # fmt: skip
REPO = Path(__file__).resolve().parents[2]


def write_description(
    run: Path, config: Config, layout: dict[str, int], parameters: dict[str, Any], device: str
) -> None:
    """Writes `run`/run.json and `run`/config.yaml.

    Args:
        layout: ranks in all, and in each direction.
        parameters: counts of the model's parameters.
    """
    plain = to_dict(config)
    description = {
        "config": plain,
        "versions": {"python": sys.version.split()[0], **_versions(PACKAGES)},
        "git": git_commit(REPO),
        KEY: identify(config.data.tokenizer).to_dict(),
        "layout": layout,
        "device": device,
        "device_name": hardware.device_name(),
        "parameters": parameters,
    }
    write_atomically(run / RUN_FILE, json.dumps(description, indent=1) + "\n")
    write_atomically(run / CONFIG_FILE, yaml.safe_dump(plain, sort_keys=False))


def _versions(packages: Iterable[str]) -> dict[str, str]:
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue  # an optional one
    return versions


def git_commit(folder: Path) -> dict[str, Any] | None:
    """Commit of a checkout and whether files were changed since; None outside of git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != folder:
            return None
        changed = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"commit": git("rev-parse", "HEAD"), "changed": changed}
    except (OSError, subprocess.CalledProcessError):
        return None
