"""torch_npu, the package for Ascend NPUs, where it is installed: imported, or hidden.

Without its driver (CANN) it cannot be imported, and torch, which imports it along with itself, and
transformers, which takes any that is installed for a working one, would fail with it.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import Any

NAME = "torch_npu"
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # torch's own import of it

broken: str | None = None  # why it could not be imported
if find_spec(NAME) is not None:
    try:
        import torch_npu  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        broken = str(error)
        modules: dict[str, Any] = sys.modules
        modules[NAME] = None  # as if it were not there


def usable() -> bool:
    """Whether it is here, and imported."""
    return sys.modules.get(NAME) is not None


def package() -> Any:
    """The package; ImportError where it is not `usable`."""
    import torch_npu

    return torch_npu
