"""launch/train.py in another working directory, where rank 1 is late, and the logger of rank 0
takes its time to end, as an upload does: late.py FOLDER ...

Each rank saves whether that logger had ended before it did.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path

from moss_train.train.loggers import TensorBoard
from tests.torchrun import REPO, save_result

if __name__ == "__main__":
    folder = sys.argv.pop(1)
    os.chdir(folder)
    closed, close = Path(folder, "closed"), TensorBoard.close

    def close_late(self: TensorBoard, failed: bool) -> None:
        close(self, failed)
        time.sleep(2)
        closed.touch()

    TensorBoard.close = close_late  # type: ignore[method-assign]
    if os.environ["RANK"] == "1":
        time.sleep(2.1)  # another second on the clock
    try:
        runpy.run_path(str(REPO / "launch" / "train.py"), run_name="__main__")
    finally:
        save_result("ended", closed.exists(), as_json=True)
