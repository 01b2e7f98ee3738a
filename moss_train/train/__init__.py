"""Training: one step, the loop, optimizer and schedule, checkpoints, metrics."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    """This folder can be called: `moss_train.train(config)` is that of moss_train/api.py.

    The name belongs to both. Importing a module of the folder would hide a function of that name.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return import_module("moss_train.api").train(*args, **kwargs)


sys.modules[__name__].__class__ = _Package
