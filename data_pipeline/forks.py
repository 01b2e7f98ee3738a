"""Keeps the garbage collector of a forked process from freeing objects of its parent.

Such objects may hold what the fork does not have (threads of a codec's filters, a device's memory):
a collector that frees them there waits for ever, or ends the process. It would also copy a memory
page for each Python object that it looks at. So it passes over all objects that were there before
the fork.
"""

from __future__ import annotations

import gc
import os

if hasattr(os, "register_at_fork"):  # not on Windows, which has no forks
    os.register_at_fork(after_in_child=gc.freeze)
