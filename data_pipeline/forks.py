"""What a forked process leaves alone of the one that it is a copy of: its garbage.

Garbage may hold what a copy does not have, threads of a codec's filters or a device's memory; a
collector that frees it there waits for ever, or ends the process. It would also make a memory page
the copy's own for each Python object that it looks at. So it passes over all that was there before
the fork.
"""

from __future__ import annotations

import gc
import os

if hasattr(os, "register_at_fork"):  # not on Windows, which has no forks
    os.register_at_fork(after_in_child=gc.freeze)
