"""Runs golden cases in several parallel layouts: golden.py FOLDER TENSORxPIPELINE ...

FOLDER holds MOSS-Video's golden numbers ("-": there are none).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

from moss_train import hardware
from tests.workers.groups import end_groups


def main(folder: Path | None, layouts: list[str]) -> None:
    """Saves what each case gives in each layout, for this rank."""
    hardware.activate("cpu")
    dist.init_process_group("gloo")
    for layout in layouts:
        run_layout(folder, layout)
        end_groups()
    dist.barrier()
    dist.destroy_process_group()


def run_layout(folder: Path | None, layout: str) -> None:
    """All cases in one layout."""
    from moss_train.config import ParallelConfig
    from moss_train.parallel.process_groups import build_groups
    from tests.moss_train.model import golden
    from tests.torchrun import save_result

    tensor, pipeline = map(int, layout.split("x"))
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
    groups = build_groups(parallel, seed=1)
    out = {"mllama": golden.run_case(golden.mllama_model(parallel, groups), golden.mllama_case())}
    if folder is not None:
        model = golden.golden_model(folder, parallel, groups)
        for name in golden.CASES:
            out[name] = golden.run_case(model, golden.golden_case(folder, name))
    save_result(layout, out)


if __name__ == "__main__":
    main(None if sys.argv[1] == "-" else Path(sys.argv[1]), sys.argv[2:])
