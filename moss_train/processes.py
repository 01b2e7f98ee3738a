"""What Linux says of a process."""

from __future__ import annotations

import os
from pathlib import Path


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
