"""What findings are of: the device, the packages and the code that they were found with."""

from __future__ import annotations

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

from moss_train import hardware
from tools.gpu_check.preflight import versions

REPO = Path(__file__).resolve().parents[2]
CODE = (
    "moss_train/**/*.py", "data_pipeline/**/*.py", "tools/gpu_check/*.py", "tools/differences.py",
    "conf/**/*.yaml",
)  # fmt: skip
LIMIT = 300.0  # seconds for a look at the device


def setting(rehearse: bool) -> dict[str, str]:
    """Tells findings apart: those of a rehearsal, or of other code, say nothing of this run.

    A process of its own looks at the device: a GPU may admit one process alone, which then has to
    be a section's.

    Raises:
        RuntimeError: the device does not answer.
    """
    if rehearse:
        hardware.activate("cpu")
        return {"device": "rehearsed", **versions(), "code": _code()}
    command = [sys.executable, "-m", "tools.gpu_check.setting"]
    try:
        found = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, timeout=LIMIT
        )
    except subprocess.SubprocessError as error:
        raise RuntimeError(f"the device does not say what it is: {error}") from None
    return dict(json.loads(found.stdout.splitlines()[-1]))


def _code() -> str:
    """A digest of all files that a section may run or read."""
    digest = sha256()
    for file in sorted(path for pattern in CODE for path in REPO.glob(pattern)):
        digest.update(f"{file.relative_to(REPO)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    print(json.dumps({"device": hardware.device_name(), **versions(), "code": _code()}))
