"""Packages that cannot be installed where tests run, with the real ones' signatures and refusals.

Each folder is put on the path in place of one: `with stand_in(monkeypatch, "flash_attn_2"): ...`.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
MODULES = {
    "flash_attn_2": "flash_attn",
    "flash_attn_4": "flash_attn.cute.interface",
    "te": "transformer_engine",
    "npu": "torch_npu",
}


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: str, **settings: Any) -> Any:
    """The module of a folder here, which is imported by its name until the test ends.

    settings: what the module has for tests, such as `OTHER_DTYPES=True`.
    """
    name = MODULES[folder]
    for other in [key for key in sys.modules if key.split(".")[0] == name.split(".")[0]]:
        monkeypatch.delitem(sys.modules, other)
    monkeypatch.syspath_prepend(str(FOLDER / folder))
    module = importlib.import_module(name)
    for loaded in [key for key in sys.modules if key.split(".")[0] == name.split(".")[0]]:
        monkeypatch.setitem(sys.modules, loaded, sys.modules.pop(loaded))
    for setting, value in settings.items():
        monkeypatch.setattr(module, setting, value)
    module.calls.clear()
    return module
