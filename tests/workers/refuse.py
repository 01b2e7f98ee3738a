"""What launch/train.py says to wrong command lines, one after another in one process.

refuse.py FILE: FILE holds [[ranks, ["run.dir=FOLDER", override, ...]], ...]. The answers are saved
as `answers`: exit code, what was printed, whether a process group or megatron's core had been
started, what was left in FOLDER.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist

from tests.torchrun import REPO, save_result


def main(cases: list[tuple[int, list[str]]]) -> None:
    answers = []
    for ranks, overrides in cases:
        if ranks > 1:  # nobody waits for the others: it ends before
            os.environ |= {"RANK": "0", "WORLD_SIZE": str(ranks)}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
        else:
            os.environ.pop("RANK", None)
            os.environ.pop("WORLD_SIZE", None)
        sys.argv = ["train.py", *overrides]
        code = None
        with tempfile.TemporaryFile("w+") as said:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                try:
                    runpy.run_path(str(REPO / "launch" / "train.py"), run_name="__main__")
                except SystemExit as end:
                    code = end.code
            said.seek(0)
            text = said.read()
        began = dist.is_initialized() or "megatron.core" in sys.modules
        left = [path.name for path in Path(overrides[0].partition("=")[2]).glob("*")]
        answers.append({"code": code, "said": text, "began": began, "left": left})
        save_result("answers", answers, as_json=True)  # what follows may hang


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
