"""Serves a model whose engine never ends its first step: python stuck_server.py FLAGS..."""

from __future__ import annotations

import sys
import threading
from typing import Any

from inference.engine.engine import Engine
from inference.serve.command import main


def stuck(self: Engine, steps: Any) -> Any:
    threading.Event().wait()


if __name__ == "__main__":
    Engine.step = stuck  # type: ignore[method-assign]
    raise SystemExit(main(sys.argv[1:]))
