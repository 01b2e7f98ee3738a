"""Stands for Transformer Engine 2.20: its DotProductAttention (dot_product.py).

megatron-core imports many other names where it finds the package, and extends some of them: those
with a capital are empty classes here, others empty modules, made when they are asked for.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

from transformer_engine.dot_product import DotProductAttention, calls  # noqa: F401

__version__ = "2.20.2"


class _Empty(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "DotProductAttention":
            made: Any = DotProductAttention
        elif name[0].isupper():
            made = type(name, (), {})
        else:
            made = importlib.import_module(f"{self.__name__}.{name}")
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.startswith(f"{__name__}."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Empty(spec.name)

    def exec_module(self, module): ...


sys.meta_path.append(_Finder())
for name in ("pytorch", "pytorch.distributed", "common", "common.recipe"):
    importlib.import_module(f"{__name__}.{name}")
