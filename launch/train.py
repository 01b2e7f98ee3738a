"""Starts a training run: `torchrun --nproc-per-node N launch/train.py stage=pt1 ...`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# A checkout works without installing it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors: `explain` says them in one line

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.distributed.elastic.multiprocessing.errors import record

from moss_train.config import RENAMED, Config
from moss_train.main import train

ConfigStore.instance().store(name="schema", node=Config)


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def compose_and_train(raw: DictConfig) -> None:
    """Hydra's entry."""
    OmegaConf.resolve(raw)
    train(raw)


def explain(error: Exception) -> str:
    """What is wrong with the command line, in one line."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).partition("/")
        return f"{group}={name}: choose one of {', '.join(sorted(error.options))}"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = getattr(cause, "full_key", None)
    if key in RENAMED:
        return f"{key}: is called {RENAMED[key]} now: use that name"
    line = str(cause).splitlines()[0]
    return f"{key}: {line}" if key else line


def main() -> None:
    """Composes the configuration and runs the job on this rank."""
    try:
        compose_and_train()
    except (HydraException, OmegaConfBaseException) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"ERROR {explain(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    record(main)()
