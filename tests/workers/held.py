"""launch/train.py, which stands still after a step until it is told to stop: held.py STEP ...

However late a test is to do something to the job, the job has not ended before.
"""

from __future__ import annotations

import runpy
import sys
import time

from moss_train.imports import quick_imports
from tests.torchrun import REPO


def hold_after(step: int) -> None:
    with quick_imports():
        from moss_train.train import loop
        from moss_train.train.process import stop_signals

    class Held(loop.Job):
        """A job that waits before it reads its next step."""

        def _read(self):
            with stop_signals() as asked:
                while self.done >= step and not asked:
                    time.sleep(0.05)
            return super()._read()

    loop.Job = Held  # type: ignore[misc]


if __name__ == "__main__":
    hold_after(int(sys.argv.pop(1)))
    runpy.run_path(str(REPO / "launch" / "train.py"), run_name="__main__")
