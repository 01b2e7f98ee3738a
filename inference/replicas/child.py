"""Runs a command that ends when its parent does, however that ends:
python -m inference.replicas.child PARENT COMMAND..."""

from __future__ import annotations

import os
import sys

from data_pipeline.parent import signalled_with_parent

if __name__ == "__main__":
    signalled_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
