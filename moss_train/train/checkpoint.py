"""Checkpoints: written under a temporary name, renamed when complete, readable in any layout.

What a checkpoint holds, and how one is found, is in moss_train/checkpoint_dir.py.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Collection
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.msc_utils import MultiStorageClientFeature
from torch import nn

from data_pipeline.commands import describe
from data_pipeline.tokenizer_identity import TokenizerIdentity
from moss_train import hardware
from moss_train.checkpoint_dir import (
    checkpoints_folder,
    flaw,
    is_complete,
    read_run,
    set_aside,
    steps_in,
)
from moss_train.config import AdapterConfig, Config, to_dict
from moss_train.convert.megatron_files import CONTENT
from moss_train.log import log
from moss_train.model.lora import adapt, is_adapter, merge
from moss_train.model.moss_video import MossVideo
from moss_train.storage import StorageError
from moss_train.train.optimizer import TrainState
from moss_train.train.optimizer_state import load_rest, sharded_state
from moss_train.train.save import Save, SaveError
from moss_train.train.staging import Staging
from moss_train.trained_tokenizer import KEY

# Where its package is installed megatron-core would open files through a client of object stores,
# which counts every write of a tensor's header: most of the writers' time in small jobs.
MultiStorageClientFeature.disable()
# megatron-core 0.19's own default for asynchronous saving is another package.
_HAS_STRATEGIES = "async_strategy" in signature(dist_checkpointing.save).parameters
STRATEGY: dict[str, Any] = {"async_strategy": "mcore"} if _HAS_STRATEGIES else {}


class Checkpointer:
    """Saves and loads the state of a run. Every method is a collective, but for one."""

    def __init__(
        self,
        config: Config,
        model: MossVideo,
        state: TrainState,
        tokenizer: TokenizerIdentity | None,
    ):
        """`tokenizer`: the one that the weights are trained with; None: it is not known."""
        self.config, self.model, self.state, self.tokenizer = config, model, state, tokenizer
        self.folder = checkpoints_folder(Path(config.run.dir))
        self.last = False  # the save that was begun last ends the job
        on_device, configured = hardware.on_accelerator(), config.trainer.async_save
        self.queue = (
            AsyncCallsQueue() if (on_device if configured is None else configured) else None
        )
        self.staging = Staging(on_device)
        # Every rank of a data-parallel group writes a part of the weights that all of them hold.
        self.strategy = FullyParallelSaveStrategyWrapper(
            get_default_save_sharded_strategy(),
            model.groups.decoder.dp_cp,
            do_cache_distribution=True,
        )

    def open_folder(self, damaged: Collection[Path] = ()) -> None:
        """Makes the folder, on rank 0 before the first `save`; removes what a killed job left
        there, and gives damaged checkpoints (those in `damaged`, too) another name. No collective.

        Raises:
            StorageError: the folder cannot be made or changed.
        """
        try:
            self._open_folder(damaged)
        except OSError as error:
            raise StorageError(f"run.dir: {describe(error)}") from None

    def _open_folder(self, damaged: Collection[Path]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for pattern in (".writing_*", ".removing_*"):
            for leftover in self.folder.glob(pattern):
                log.warning("removing %s: a save or a removal that was cut off", leftover)
                try:
                    shutil.rmtree(leftover)
                except OSError as error:  # NFS keeps files that a process still has open
                    log.warning("%s cannot be removed: %s", leftover, error)
        for path in steps_in(self.folder):
            if path in damaged or flaw(path) is not None:
                set_aside(path)

    def save(
        self, step: int, samples: int, order: dict[str, Any] | None, last: bool = True
    ) -> None:
        """Saves after `step`. One that fails is a warning, and leaves no file; the checkpoints that
        are there stay.

        Args:
            order: where the run stands in its data, on rank 0.
            last: the job ends with it: a failure is an error.

        Raises:
            SaveError: on all ranks.
        """
        self.finish()
        self.last = last
        saving = Save(self.folder, step)
        try:
            saving.open()
            with saving.noting():
                request = dist_checkpointing.save(
                    self._sharded_state(loading=False),
                    str(saving.temporary),
                    sharded_strategy=self.strategy,
                    async_sharded_save=True,
                    content_metadata=CONTENT,
                    **STRATEGY,
                )
        except SaveError as error:
            self._failed(error)
            return
        assert isinstance(request, AsyncRequest)
        finalize_fns = request.finalize_fns

        def finalize() -> None:
            self.staging.release()
            try:
                saving.complete(finalize_fns, lambda: self._rest(step, samples, order))
            except SaveError as error:
                self._failed(error)
            else:
                if dist.get_rank() == 0:
                    self._remove_old()

        request = self.staging.checked(saving.summing(request))._replace(finalize_fns=[finalize])
        if self.queue is None:
            request.execute_sync()
        else:
            self.queue.schedule_async_request(request)

    def _failed(self, error: SaveError) -> None:
        if self.last:
            raise error
        log.warning("%s: training goes on, the last checkpoint stays", error)

    def poll(self) -> None:
        """Completes an asynchronous save whose files are written."""
        if self.queue is not None:
            self.queue.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        """Waits for an asynchronous save."""
        if self.queue is not None:
            self.queue.maybe_finalize_async_calls(blocking=True)

    def close(self) -> None:
        """Ends the writer process."""
        self.finish()
        if self.queue is not None:
            self.queue.close()

    def load(self, path: Path) -> dict[str, Any]:
        """Loads `path`, saved in any layout; returns its `run.json`."""
        run = read_run(path)
        state = dist_checkpointing.load(
            self._sharded_state(loading=True, random_state=run["layout"] == self._layout()),
            str(path),
        )
        _set_model(self.model, state["model"])
        load_rest(self.state.optimizer, state["optimizer"])
        if "random" in state:
            _set_random_state(state["random"])
        return run

    def load_weights(self, path: Path) -> None:
        """Loads weights alone, for a new stage: its optimizer, random state and step are new."""
        load_weights(self.model, path)
        self.state.optimizer.reload_model_params()

    def _sharded_state(self, loading: bool, random_state: bool = True) -> dict[str, Any]:
        model = _model_state(self.model)
        flat = {key: value for part in model.values() for key, value in part.items()}
        state: dict[str, Any] = {
            "model": model,
            "optimizer": sharded_state(self.state.optimizer, flat, loading),
        }
        if random_state:
            world, rank = dist.get_world_size(), dist.get_rank()
            state["random"] = ShardedObject("random", _random_state(), (world,), (rank,))
        return state

    def _layout(self) -> dict[str, int]:
        parallel = self.config.parallel
        return {
            "world": dist.get_world_size(),
            "tensor": parallel.tensor,
            "pipeline": parallel.pipeline,
            "virtual": parallel.virtual,
        }

    def _rest(self, step: int, samples: int, order: dict[str, Any] | None) -> dict[str, str]:
        """The files of a checkpoint that are not megatron's: their contents, by name."""
        run = {
            "step": step,
            "samples": samples,
            "data_order": order,
            "layout": self._layout(),
            "versions": {name: version(name) for name in ("torch", "megatron-core")},
            KEY: self.tokenizer and self.tokenizer.to_dict(),
            "config": to_dict(self.config),
        }
        return {"run.json": json.dumps(run, indent=1)}

    def _remove_old(self) -> None:
        """Removes complete checkpoints beyond the newest `keep_last`. A failure is a warning."""
        try:
            complete = [path for path in steps_in(self.folder) if is_complete(path)]
            for path in complete[: -self.config.trainer.keep_last]:
                shutil.rmtree(path.rename(self.folder / f".removing_{path.name}"))
        except (OSError, StorageError) as error:
            log.warning("an old checkpoint could not be removed: %s", error)


def load_weights(model: MossVideo, path: Path) -> None:
    """Fills `model` with the weights of checkpoint `path`, saved in any layout. A collective.

    Adapters that the model does not have are merged; those that only the model has are left as
    they are.
    """
    adapter = read_run(path)["config"].get("adapter", {"name": "none"})
    merging = adapter["name"] != "none" and not model.adapted
    if merging:
        adapt(model.layers, AdapterConfig(**adapter))
    state = _model_state(model)
    if adapter["name"] == "none":
        state = {
            part: {name: value for name, value in tensors.items() if not is_adapter(name)}
            for part, tensors in state.items()
        }
    _set_model(model, dist_checkpointing.load({"model": state}, str(path))["model"])
    if merging:
        merge(model.layers)


def _set_model(model: MossVideo, parts: dict[str, dict[str, Any]]) -> None:
    modules: dict[str, nn.Module] = {"encoder": model.encoder}
    modules |= {f"chunk{number}": chunk for number, chunk in enumerate(model.chunks)}
    for name, module in modules.items():
        answer = module.load_state_dict(parts[name], strict=False)
        missing = [key for key in answer.missing_keys if not is_adapter(key)]
        if missing or answer.unexpected_keys:
            raise RuntimeError(f"{name}: missing {missing}, unknown {answer.unexpected_keys}")


def _model_state(model: MossVideo) -> dict[str, dict[str, Any]]:
    vision = CONTENT | {"dp_cp_group": model.groups.vision.dp_cp}
    decoder = CONTENT | {"dp_cp_group": model.groups.decoder.dp_cp}
    state = {"encoder": _strip(model.encoder.sharded_state_dict("", (), vision), "")}
    for number, chunk in enumerate(model.chunks):
        sharded = chunk.sharded_state_dict("decoder.", (), decoder)
        state[f"chunk{number}"] = _strip(sharded, "decoder.")
    return state


def _strip(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in state.items()}


def _random_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "torch": torch.get_rng_state(),
        "device": hardware.random_state(),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    # That of another kind of device has another size: this one's generator stays as seeded.
    if len(state["device"]) == len(hardware.random_state()):
        hardware.set_random_state(state["device"])
