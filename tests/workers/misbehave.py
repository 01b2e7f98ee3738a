"""A worker that does as it is told: misbehave.py well | exit | raise | hang | interrupt."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from tests.torchrun import save_result


def main(how: str) -> None:
    """Rank 1 is the one that misbehaves; the others wait for it for minutes."""
    rank = int(os.environ["RANK"])
    save_result("rank", rank, as_json=True)
    save_result("tensor", torch.full((2,), float(rank)))
    print(f"rank {rank} says hello")
    if how == "raise" and rank == 1:
        raise ValueError("rank one had a bad day")
    if how == "exit":
        sys.exit(0)
    if how == "interrupt":
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(600)
        except KeyboardInterrupt:
            save_result("interrupted", True, as_json=True)
            return
    if how != "well":
        time.sleep(600)


if __name__ == "__main__":
    main(sys.argv[1])
