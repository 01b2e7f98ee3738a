"""Saves an imported checkpoint from several layouts: convert.py CHECKPOINT OUT '{"tp2": {}, ...}'.

Each layout's run folder is OUT/NAME. Each rank leaves under NAME what the layout makes of the
golden case, rank 0 under NAME-weights the weights as HF tensors. `lora` adds adapters.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from moss_train.checkpoint_dir import read_run
from moss_train.config import AdapterConfig, ParallelConfig, from_dict
from tests.workers.groups import end_groups


def main(checkpoint: Path, out: Path, layouts: dict) -> None:
    from moss_train.train.process import start_process_group

    for number, (name, layout) in enumerate(layouts.items()):
        config = from_dict(read_run(checkpoint)["config"])
        config.hardware.device, config.hardware.threads = "cpu", 1
        config.run.dir = str(out / name)
        if layout.pop("lora", False):
            config.adapter = AdapterConfig("lora", rank=2, alpha=3.0)
        config.parallel = ParallelConfig(**layout)
        if number == 0:
            start_process_group(config)
        save(name, config, checkpoint)
        end_groups()
    dist.barrier()
    dist.destroy_process_group()


def save(name: str, config, checkpoint: Path) -> None:
    from moss_train.convert.random_init import random_reader
    from moss_train.convert.weights import fill
    from moss_train.model.moss_video import MossVideo
    from moss_train.parallel.process_groups import build_groups
    from moss_train.train.checkpoint import Checkpointer, _model_state, load_weights
    from moss_train.verify.forward import run_forward
    from tests.moss_train.model.golden import mllama_case
    from tests.torchrun import save_result
    from tests.workers.job import whole_weights
    from tests.workers.matrix import uneven

    groups = build_groups(config.parallel, seed=0)
    model = MossVideo(config.model, config.parallel, groups, config.adapter)
    if config.adapter.name == "lora":
        fill(model, uneven(random_reader(config.model, seed=8)))
    load_weights(model, checkpoint)
    if config.adapter.name == "none" and config.parallel.virtual == 1:
        case = mllama_case()
        made = run_forward(model, case, len(case.expected["greedy"]))
        save_result(name, made)  # of the last rank: it is on the last stage

    class WeightsAlone(Checkpointer):
        """A training checkpoint without the optimizer, which has no state before a step."""

        def _sharded_state(self, loading: bool, random_state: bool = True) -> dict[str, Any]:
            return {"model": _model_state(self.model)}

    checkpointer = WeightsAlone(config, model, cast(Any, None), tokenizer=None)
    if dist.get_rank() == 0:
        checkpointer.open_folder()
    checkpointer.save(1, 0, None)
    checkpointer.close()
    weights = whole_weights(model)
    if dist.get_rank() == 0:
        save_result(f"{name}-weights", {n: w.detach() for n, w in weights.items()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
