"""torchrun with an exit code of its own for a job that was stopped before its end: 130.

    python launch/torchrun.py --nproc-per-node 8 launch/train.py stage=pt1 ...

torchrun takes every code of a rank but 0 for a failure, kills the others and starts them again. So
ranks that stop on a signal end with 0 and leave a note. This command ends with 130 where it finds
the note (on each machine its own), and a job script can put the job into the queue again. After a
signal ranks have TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds to save (default: 270; of torchrun: 30).
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

# A checkout works without installing it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException

from data_pipeline.commands import DONE, FAILED, STOPPED
from moss_train.main import STOPPED_NOTE


def main(arguments: list[str] | None = None) -> int:
    """Runs torchrun with `arguments`; its exit code, or 130."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "270")
    # Else ranks that are started again may find the addresses of those that have ended.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with tempfile.TemporaryDirectory(prefix="moss-train-") as folder:
        note = Path(folder) / "stopped"
        os.environ[STOPPED_NOTE] = str(note)
        code = DONE
        try:
            run.main(arguments)
        except SignalException as error:
            print(error, file=sys.stderr)
            code = FAILED
        if not note.exists():
            return code
        if int(os.environ.get("SLURM_NNODES", "1")) > 1:
            time.sleep(10)  # srun --kill-on-bad-exit ends the other machines, too
        return STOPPED


if __name__ == "__main__":
    sys.exit(main())
