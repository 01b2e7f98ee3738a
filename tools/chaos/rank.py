"""A rank of the job: launch/train.py, on a storage that is slow while a file is there.

    rank.py SWITCH FOLDER OVERRIDE...

While the file SWITCH exists, this process and its forks open files under FOLDER late.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path

DELAY = 0.2  # seconds for each file
REPO = Path(__file__).resolve().parents[2]


def slow_down(switch: str, folder: str) -> None:
    """Delays this process's opening of files from now on."""

    def hook(event: str, details: tuple) -> None:
        if event == "open" and str(details[0]).startswith(folder) and os.path.exists(switch):
            time.sleep(DELAY)

    sys.addaudithook(hook)


if __name__ == "__main__":
    slow_down(sys.argv.pop(1), sys.argv.pop(1))
    runpy.run_path(str(REPO / "launch" / "train.py"), run_name="__main__")
