"""One logger: date, host, rank, level, message. Ranks other than 0 log errors only."""

from __future__ import annotations

import logging
import os
import socket
import warnings

log = logging.getLogger("moss_train")


def configure(quiet: bool = False) -> None:
    """Sets up the logger of this process, and silences other libraries.

    quiet: warnings and errors only.
    """
    host, rank = socket.gethostname().partition(".")[0], os.environ.get("RANK", "0")
    form = f"%(asctime)s {host} rank {rank} %(levelname)s %(message)s"
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(form, "%Y-%m-%d %H:%M:%S"))
    log.handlers = [handler]
    log.propagate = False
    level = logging.WARNING if quiet else logging.INFO
    log.setLevel(level if rank == "0" else logging.ERROR)
    silence_advice()


def print_line(text: str) -> None:
    """A warning of any rank; the logger drops those of all but the first."""
    log.handle(log.makeRecord(log.name, logging.WARNING, __file__, 0, text, (), None))


def silence_advice() -> None:
    """Hides what other libraries advise, when they are imported and later."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    for module in ("megatron", "torch", "apex", "transformer_engine"):
        warnings.filterwarnings("ignore", module=rf"{module}\..*")
