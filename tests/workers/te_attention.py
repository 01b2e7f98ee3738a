"""A model on Transformer Engine's stand-in against sdpa, in a process in which megatron-core finds
that package. Prints the calls of each form."""

from __future__ import annotations

import sys
from collections import Counter

from tests.stand_ins import FOLDER

sys.path.insert(0, str(FOLDER / "te"))

import torch.distributed as dist
from transformer_engine import dot_product  # type: ignore[import-not-found]

from moss_train import hardware
from moss_train.config import ParallelConfig
from moss_train.imports import quick_imports

with quick_imports():
    from moss_train.parallel.process_groups import build_groups
    from tests.moss_train.model.numbers import PACKED, compare

if __name__ == "__main__":
    hardware.activate("cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dot_product.OTHER_DTYPES = True
    compare(build_groups(ParallelConfig(), seed=1), "te", PACKED)
    print(dict(Counter(dot_product.calls)))
    dist.destroy_process_group()
