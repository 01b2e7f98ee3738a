"""What Linux says of a process, and how a rank ends with its launcher."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from data_pipeline.parent import signalled_with_parent

PROGRAM = "moss-train"  # in front of errors
# Environment: the file that says that a signal stopped the job, for launch/torchrun.py.
STOPPED_NOTE = "MOSS_TRAIN_STOPPED"


def stat_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name: the state's letter first (man proc).

    Raises:
        OSError: there is no such process, or no Linux.
    """
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def age_s(pid: int) -> float:
    """Seconds since a process was started. Raises OSError as `stat_fields` does."""
    since_boot = int(stat_fields(pid)[19]) / os.sysconf("SC_CLK_TCK")
    return float(Path("/proc/uptime").read_text().split()[0]) - since_boot


def end_with_launcher() -> None:
    """Lets a rank of torchrun's end with its launcher: a launcher that is killed stops the rank, as
    a signal does; else the rank would go on without one. To be called before anything that takes
    time: of a launcher that has gone already only launch/torchrun.py leaves a trace."""
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    signalled_with_parent(os.getppid(), signal.SIGTERM)
    if not os.path.exists(os.environ.get(STOPPED_NOTE, os.devnull)):
        os._exit(1)
