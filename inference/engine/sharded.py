"""The engine in several processes, started by torchrun: each holds a slice of the model.

Rank 0 is the engine that the program sees. Each of its calls that computes or changes something is
broadcast (`on_all`) and runs on every rank, on that rank's slice (see tensor_parallel.py). A call
that is not possible is refused on rank 0 before it is broadcast, so all ranks stay in step; a rank
that fails ends all of them (torchrun).
"""

from __future__ import annotations

import atexit
import io
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline import devices
from data_pipeline.ranks import joining, ranks_of
from inference.engine.engine import Engine
from inference.engine.sampling import Sampling
from inference.engine.slots import Slot, Step

IDLE = timedelta(days=3650)  # other ranks wait for the next call without a time limit


def join(kind: str) -> tuple[int, int]:
    """This process's rank and how many there are, as torchrun says; the process group is made,
    for a kind of device.

    Raises:
        RanksError, JoinError: the environment is wrong, or the ranks do not come together.
    """
    ranks = ranks_of()
    if ranks.size > 1 and not dist.is_initialized():
        with joining(ranks, partial(print, file=sys.stderr, flush=True)):
            dist.init_process_group(devices.backend(kind))
    return ranks.rank, ranks.size


class ShardedEngine(Engine):
    """An engine whose model is a slice. Rank 0 is used like any engine; other ranks `follow`."""

    recovers = False  # whether the other ranks failed too is not known: they may wait for this one

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.leads = dist.get_rank() == 0
        self.ranks = dist.get_world_size()
        self.control = dist.new_group(backend="gloo", timeout=IDLE)
        self.running = True
        if self.leads:
            atexit.register(self.shutdown)

    def shutdown(self) -> None:
        """Ends the other ranks."""
        if self.leads and self.running:
            self.on_all(ShardedEngine._stop)

    def abandon(self) -> None:
        """No more calls: a step has failed, and the other ranks may wait in the middle of it."""
        self.running = False

    def follow(self) -> None:
        """What other ranks do: the calls of rank 0, until it shuts down."""
        with _outliving_signals():
            while self.running:
                function, arguments = self._receive()
                function(self, *arguments)
                for slot in self.slots.values():
                    slot.evictions.clear()  # rank 0 reports them

    def open(self, sampling: Sampling | None = None) -> Slot:
        self.check_free()
        return self.on_all(Engine.open, sampling or Sampling())  # the same seed on every rank

    def set_sampling(self, slot: Slot, sampling: Sampling) -> None:
        self.on_all(Engine.set_sampling, slot, sampling)

    def close(self, slot: Slot) -> None:
        if not slot.closed:
            self.on_all(Engine.close, slot)

    def encode_pixels(self, pixels: Tensor) -> list[Tensor]:
        return self.on_all(Engine.encode_pixels, pixels)

    def step(self, steps: Sequence[Step]) -> list[int | None]:
        self.check(steps)
        return self.on_all(Engine.step, steps)

    def save(self, slot: Slot) -> dict[str, Any]:
        """The whole session, as one process would save it."""
        return self.on_all(ShardedEngine._gather, slot)

    def restore(self, state: dict[str, Any]) -> Slot:
        self.check_state(state)
        self.check_free()
        return self.on_all(ShardedEngine._restore, state)

    def check_state(self, state: dict[str, Any]) -> None:
        super().check_state(state if state["text"].shape[2] == self._heads else self._own(state))

    def _stop(self) -> None:
        self.running = False
        dist.destroy_process_group()  # else its threads may abort the process's exit

    def _gather(self, slot: Slot) -> dict[str, Any]:
        own = Engine.save(self, slot)
        parts: list[Any] | None = [None] * self.ranks if self.leads else None
        dist.gather_object((own["text"], own["frames"]), parts, dst=0, group=self.control)
        if parts is not None:
            # [layers, 2, KV heads, L, D]
            own["text"] = torch.cat([text for text, _ in parts], dim=2)
            own["frames"] = torch.cat([frames for _, frames in parts], dim=2)
        return own

    def _restore(self, state: dict[str, Any]) -> Slot:
        return Engine.restore(self, self._own(state))

    @property
    def _heads(self) -> int:
        return self.cache.text.shape[3]

    def _own(self, state: dict[str, Any]) -> dict[str, Any]:
        """This rank's KV heads of a saved session."""
        start = dist.get_rank() * self._heads
        own = {name: state[name].narrow(2, start, self._heads) for name in ("text", "frames")}
        return {**state, **own}

    # One call on all ranks. Its arguments are pickled, with two exceptions: a slot travels as its
    # index and its pending token, and a tensor on the engine's device is broadcast from there.

    def on_all(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs `function(self, *arguments)` on every rank; rank 0's result."""
        if not self.running:
            raise RuntimeError("the other ranks have gone")
        file = io.BytesIO()
        pickler = _Pickler(file, self.device)
        pickler.dump((function, arguments))
        dist.broadcast_object_list([file.getvalue()], src=0, group=self.control)
        for tensor in pickler.tensors:
            dist.broadcast(tensor, src=0)
        return function(self, *arguments)

    def _receive(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """On other ranks: the next function of `on_all`, and its arguments."""
        messages: list[Any] = [None]
        dist.broadcast_object_list(messages, src=0, group=self.control)
        return _Unpickler(io.BytesIO(messages[0]), self.slots, self.device).load()


@contextmanager
def _outliving_signals() -> Iterator[None]:
    """Ctrl-C in a terminal goes to all processes. Rank 0 then ends its sessions, for which it needs
    the others; they notice when it has gone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Pickler(pickle.Pickler):
    """Collects the tensors that are on `device`, in the order in which they are to be broadcast."""

    def __init__(self, file: io.BytesIO, device: torch.device) -> None:
        super().__init__(file)
        self._device = device
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, Slot):
            return "slot", value.index, value.pending
        if isinstance(value, Tensor) and value.device == self._device:
            self.tensors.append(value.contiguous())
            return "tensor", tuple(value.shape), value.dtype
        return None


class _Unpickler(pickle.Unpickler):
    """Receives each tensor when the message names it, and finds this rank's slots."""

    def __init__(self, file: io.BytesIO, slots: Mapping[int, Slot], device: torch.device) -> None:
        super().__init__(file)
        self._slots, self._device = slots, device

    def persistent_load(self, reference: Any) -> Any:
        kind, first, second = reference
        if kind == "slot":
            slot = self._slots[first]
            slot.pending = second
            return slot
        tensor = torch.empty(first, dtype=second, device=self._device)
        dist.broadcast(tensor, src=0)
        return tensor
