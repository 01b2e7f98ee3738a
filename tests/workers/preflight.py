"""tools.preflight, where rank 1 is unfit: preflight.py HOW OVERRIDE...

well. storage: it cannot write. other: it has another configuration. hang: its storage does not
answer.
"""

from __future__ import annotations

import os
import resource
import signal
import sys

from tools.preflight.__main__ import main


def stop_at_storage(event: str, details: tuple) -> None:
    """As a file system does that does not answer."""
    if event == "open" and str(details[0]).endswith(".preflight_1"):
        os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    how, *arguments = sys.argv[1:]
    if os.environ["RANK"] == "1":
        if how == "storage":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        if how == "other":
            arguments.append("trainer.seed=99")
        if how == "hang":
            sys.addaudithook(stop_at_storage)
    sys.exit(main(arguments))
