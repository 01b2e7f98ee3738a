"""Commands of a page, run as forks of one process that has imported torch and megatron.

Most of the time of such commands is importing these.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from tests.conftest import REPO
from tools import preloaded

PACKAGES = ("conf", "data_pipeline", "inference", "launch", "moss_train", "tools")


def make_checkout(folder: Path) -> Path:
    """Makes `folder` look like a checkout, of this code."""
    for name in PACKAGES:
        (folder / name).symlink_to(REPO / name)
    return folder


def run(command: str, checkout: Path, seconds: float = 240) -> str:
    """What a line of a page prints in `checkout`.

    Args:
        command: `python -m MODULE ...` or `torchrun OPTIONS FILE.py ...`, quoted as in a shell.
        seconds: the longest that it may take.
    """
    words = shlex.split(command)
    if words[0] == "torchrun":
        file = next(number for number, word in enumerate(words) if word.endswith(".py"))
        module = "torch.distributed.run"
        arguments = preloaded.torchrun(words[1:file], Path(words[file]), words[file + 1 :])
    else:
        assert words[:2] == ["python", "-m"], command
        module, arguments = words[2], words[3:]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
    log = checkout / "log"
    code = preloaded.Command(module, arguments, environment, log, checkout).wait(seconds)
    assert code == 0, f"{command}\n{log.read_text()[-4000:]}"
    return log.read_text()
