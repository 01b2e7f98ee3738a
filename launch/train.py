"""Starts a training run: `torchrun --nproc-per-node N launch/train.py stage=pt1 ...`."""

from __future__ import annotations

import sys
from pathlib import Path

# A checkout works without installing it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hydra
from omegaconf import DictConfig, OmegaConf
from torch.distributed.elastic.multiprocessing.errors import record

from moss_train.launch import main as train


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(raw: DictConfig) -> None:
    """Hydra's entry."""
    OmegaConf.resolve(raw)
    train(raw)


if __name__ == "__main__":
    record(main)()
