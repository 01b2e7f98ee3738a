"""Starts a training run: `torchrun --nproc-per-node N launch/train.py stage=pt1 ...`."""

from __future__ import annotations

import sys
from pathlib import Path

# A checkout works without installing it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moss_train.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
