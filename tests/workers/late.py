"""launch/train.py in another working directory, where rank 1 is late: late.py FOLDER ..."""

from __future__ import annotations

import os
import runpy
import sys
import time

from tests.torchrun import REPO

if __name__ == "__main__":
    folder = sys.argv.pop(1)
    os.chdir(folder)
    if os.environ["RANK"] == "1":
        time.sleep(2.1)  # another second on the clock
    runpy.run_path(str(REPO / "launch" / "train.py"), run_name="__main__")
