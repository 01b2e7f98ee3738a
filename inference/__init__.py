"""MOSS-Video without megatron: the model as transformers loads it, and the streaming engine.

    with inference.load("exports/live") as model:
        print(model.chat("Where is the circle?", images=["picture.jpg"]))
        for event in model.watch("clip.mp4", "Tell me what happens."):
            ...

What is named here is loaded when it is first used. See docs/python.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import data_pipeline  # noqa: F401  before torch

if TYPE_CHECKING:
    from inference.api import Model, load
    from inference.engine.sampling import Sampling
    from inference.session.events import Event
    from inference.session.session import SessionConfig

__all__ = ["Event", "Model", "Sampling", "SessionConfig", "load"]

_MODULES = {
    "Event": "session.events", "Model": "api", "Sampling": "engine.sampling",
    "SessionConfig": "session.session", "load": "api",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'inference' has no attribute {name!r}")
    return getattr(import_module(f"inference.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
