"""A command that says what it was given, and ends with the code named first, or not at all."""

from __future__ import annotations

import os
import sys
import time

if __name__ == "__main__":
    if sys.argv[1] == "sleep":
        time.sleep(600)
    print(os.environ.get("MARK"))
    print(*sys.argv[1:], sep=" | ")
    print(*(f"{name} {name in sys.modules}" for name in ("megatron.core", "wandb")))
    sys.exit(int(sys.argv[1]))
