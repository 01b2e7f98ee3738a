"""Two ranks, of which each finds another kernel wrong on its device: what they agree on."""

from __future__ import annotations

import torch
import torch.distributed as dist

from data_pipeline.kernel_proof import log as proofs
from moss_train.log import configure
from moss_train.model.agreement import agreed
from tests.torchrun import save_result


def main() -> None:
    configure()
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def prove(names):
        if names == ["large"]:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
        proofs.warning("b is not used on a device of rank %d: it differs", rank)
        return [name for name in names if name != "b"]

    found = [
        agreed("the kernel", lambda: ["a", "b", "c"], prove),
        agreed("the kernel", lambda: ["large"], prove),
        agreed("the kernel", lambda: [], prove),
        agreed("the kernel", lambda: ["a"], lambda names: ["a", "more"]),
    ]
    save_result("found", found, as_json=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
