"""Optimizer states in files: optimizer_state.py '[["dp4", {}], ...]', after a step in each layout.

OUT/NAME/megatron has what megatron-core's own gathering form writes, OUT/NAME/run our checkpoint.
OUT/NAME/again is our checkpoint of a new job that has read what megatron wrote in the layout
before.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moss_train import hardware
from tests.workers.groups import end_groups
from tests.workers.matrix import GLOBAL, MICRO, microbatches, small_model


def main(layouts: list[tuple[str, dict]]) -> None:
    hardware.activate("cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    out, before = Path(os.environ["MOSS_TEST_OUT"]), None
    for name, layout in layouts:
        before = one(out / name, layout, before)
        end_groups()
    dist.barrier()
    dist.destroy_process_group()


def one(out: Path, layout: dict, before: Path | None) -> Path:
    from megatron.core import dist_checkpointing

    from moss_train.checkpoint_dir import checkpoints_folder
    from moss_train.config import ParallelConfig
    from moss_train.convert.megatron_files import CONTENT
    from moss_train.parallel.process_groups import build_groups
    from moss_train.train.checkpoint import STRATEGY, _model_state
    from tests.torchrun import save_result

    groups = build_groups(ParallelConfig(**layout), seed=1)
    checkpointer = job(out / "run", layout, groups, steps=1)
    checkpointer.save(1, 4, None)
    save_result(f"{out.name}-bytes", own_bytes(checkpointer))
    model = _model_state(checkpointer.model)
    flat = {key: value for part in model.values() for key, value in part.items()}
    optimizer = checkpointer.state.optimizer.sharded_state_dict(flat, metadata=CONTENT)
    theirs = out / "megatron"
    if dist.get_rank() == 0:
        theirs.mkdir()
    dist.barrier()
    dist_checkpointing.save(
        {"model": model, "optimizer": optimizer}, str(theirs), content_metadata=CONTENT, **STRATEGY
    )
    if before is not None:
        new = job(out / "again", layout, groups, steps=0)
        load(new, before)
        new.save(1, 4, None)
        assert checkpoints_folder(out / "again").exists()
    return theirs


def job(folder: Path, layout: dict, groups: Any, steps: int) -> Any:
    """A checkpointer of a job in bf16, whose optimizer holds weights of its own, after steps."""
    from moss_train.config import Config, OptimizerConfig, ParallelConfig, TrainerConfig
    from moss_train.convert.random_init import random_reader
    from moss_train.convert.weights import fill
    from moss_train.model.moss_video import MossVideo
    from moss_train.parallel.distribute import read_step
    from moss_train.parallel.packing import Bounds
    from moss_train.train.checkpoint import Checkpointer
    from moss_train.train.guard import Guard
    from moss_train.train.optimizer import make_train_state
    from moss_train.train.param_groups import freeze
    from moss_train.train.step import TrainStep

    parallel = ParallelConfig(**layout)
    config = Config(
        model=small_model("bf16"),
        parallel=parallel,
        optimizer=OptimizerConfig(lr=1e-3),
        trainer=TrainerConfig(steps=5),
    )
    config.run.dir = str(folder)
    model = MossVideo(config.model, parallel, groups, None)
    fill(model, random_reader(config.model, seed=8 + steps))
    state = make_train_state(model, config, freeze(model, ["*"]))
    step = TrainStep(config, model, state, silence_id=11, guard=Guard(None, [], 0))
    each = GLOBAL // MICRO // groups.data_size or 1
    data = microbatches("mixed", groups.data_rank, each, MICRO) if groups.is_leader else None
    for _ in range(steps):
        size = (1, 3, 56, 56)
        step(read_step(data, each, Bounds(MICRO), 8, size, groups, step.exchange.shares))
    checkpointer = Checkpointer(config, model, state, tokenizer=None)
    checkpointer.staging.on_device = True  # compares copies, as on a GPU
    if dist.get_rank() == 0:
        checkpointer.open_folder()
    return checkpointer


def load(checkpointer: Any, folder: Path) -> None:
    """As Checkpointer.load, from files without run.json."""
    from megatron.core import dist_checkpointing

    from moss_train.train.checkpoint import _set_model
    from moss_train.train.optimizer_state import load_rest

    wanted = checkpointer._sharded_state(loading=True, random_state=False)
    state = dist_checkpointing.load(wanted, str(folder))
    _set_model(checkpointer.model, state["model"])
    load_rest(checkpointer.state.optimizer, state["optimizer"])


def own_bytes(checkpointer: Any) -> int:
    """Bytes of optimizer state that this rank alone writes."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica

    state = checkpointer._sharded_state(loading=False)["optimizer"]
    tensors = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
    return sum(t.data.nbytes for t in tensors if is_main_replica(t.replica_id))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
