"""moss_train: trains MOSS-Video, a streaming video language model, on Megatron Core.

    config = moss_train.load_config("pt1", model="toy", trainer={"steps": 20})
    run = moss_train.train(config)
    run.plot()
    run.model().generate("Where is the circle?", images=["picture.jpg"])

What is named here is loaded when it is first used. See docs/python.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import data_pipeline  # noqa: F401  before torch
from moss_train.log import silence_advice as _silence_advice

if TYPE_CHECKING:
    from moss_train.api import Run, train
    from moss_train.compose import load_config
    from moss_train.config import Config, ConfigError
    from moss_train.evaluate.model import TrainedModel

_silence_advice()  # megatron's begins with its import, which any module of this package may cause

__all__ = ["Config", "ConfigError", "Run", "TrainedModel", "load_config", "train"]

_MODULES = {
    "Config": "config", "ConfigError": "config", "Run": "api", "TrainedModel": "evaluate.model",
    "load_config": "compose",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "train":  # the folder, which can be called
        return import_module("moss_train.train")
    if name not in _MODULES:
        raise AttributeError(f"module 'moss_train' has no attribute {name!r}")
    return getattr(import_module(f"moss_train.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
