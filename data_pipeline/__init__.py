"""Samples, shards, prompts, frames and the loader: everything that knows data and no training."""

from __future__ import annotations

from data_pipeline import (  # noqa: F401
    forks,  # before this process forks
    npu,  # before torch
)
