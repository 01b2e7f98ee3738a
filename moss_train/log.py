"""One logger; on ranks other than 0 it keeps to errors."""

from __future__ import annotations

import logging
import os
import warnings

log = logging.getLogger("moss_train")


def configure() -> None:
    """Sets up the logger of this process; silences other libraries' advice on every rank."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    for module in ("megatron", "torch", "apex", "transformer_engine"):
        warnings.filterwarnings("ignore", module=rf"{module}\..*")
