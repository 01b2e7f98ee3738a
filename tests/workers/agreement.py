"""Two ranks, one of which finds something wrong: what they agree on.

agreement.py kernels: kernels on its device. agreement.py damage FOLDER: a checkpoint, which it does
not see.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipeline.kernel_proof import log as proofs
from moss_train.log import configure
from moss_train.model.agreement import agreed
from moss_train.storage import StorageError
from moss_train.train.start import damage
from tests.torchrun import save_result


def main() -> None:
    configure()
    dist.init_process_group("gloo")
    part, *folder = sys.argv[1:]
    if part == "kernels":
        save_result("found", kernels(dist.get_rank()), as_json=True)
    else:
        path = Path(folder[0]) / ("unmounted" if dist.get_rank() else "")
        try:
            found = damage(path)
        except StorageError as error:
            found = f"StorageError: {error}"
        save_result("found", found, as_json=True)
    dist.barrier()
    dist.destroy_process_group()


def kernels(rank: int) -> list[list[str]]:
    def prove(names):
        if names == ["large"]:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
        proofs.warning("b is not used on a device of rank %d: it differs", rank)
        return [name for name in names if name != "b"]

    def short():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 4 GiB")

    return [
        agreed("the kernel", lambda: ["a", "b", "c"], prove),
        agreed("the kernel", lambda: ["large"], prove),
        agreed("the kernel", lambda: [], prove),
        agreed("the kernel", lambda: ["a"], lambda names: ["a", "more"]),
        agreed("the kernel", short, prove),
    ]


if __name__ == "__main__":
    main()
