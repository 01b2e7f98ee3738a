"""The engine in several processes, started by torchrun: each holds a slice of the model.

Rank 0 is the engine that the program sees. Each of its calls that computes or changes something is
told to the others (lock_step.py) and runs on every rank, on that rank's slice (tensor_parallel.py).
A call that is not possible is refused on rank 0 before it is told, so all ranks stay in step; a
rank that fails ends all of them (lifeline.py).
"""

from __future__ import annotations

import atexit
import gc
import logging
import signal
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline import devices
from data_pipeline.ranks import joining, ranks_of
from data_pipeline.signal_handlers import handling
from inference.engine import slot_state
from inference.engine.capture import Ranks
from inference.engine.engine import Engine
from inference.engine.lifeline import Lifeline, host_of
from inference.engine.lifetime import ProcessLock, when_forgotten
from inference.engine.lock_step import Channel, Kind
from inference.engine.sampling import Sampling
from inference.engine.slots import Slot, Step
from inference.kernels.choose import Kernels

log = logging.getLogger(__name__)


def join(kind: str) -> tuple[int, int]:
    """Makes the process group, for a kind of device. Returns this process's rank and how many there
    are, as torchrun says.

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

    def __init__(self, *args: Any, **options: Any):
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.leads, self.running = self.rank == 0, True
        super().__init__(*args, **options)
        # Not before: where rank 0 fails in there, the others wait for it in the middle of a pass,
        # and take no message that says to end. They end because it has gone.
        if self.leads:
            self._others = _Others(self.channel, self.lifeline)
            when_forgotten(self, self._others.end)
            atexit.register(_end_all, weakref.ref(self), self._others)

    def meet(self) -> Ranks:
        size = self.pixels.size
        frame = self.cache.patches, self.config.text_config.hidden_size
        picture = 1, 3, size, size
        self.channel = Channel(self.device, self.dtype, self.slots, frame, picture)
        self.lifeline = Lifeline(self.rank, self.ranks, self.channel.share, host_of())
        return Ranks(self.ranks, self.leads, self._agree)

    def _agree(self, wrong: str) -> str:
        """The first rank's of which something is wrong, with its number. A collective."""
        everywhere = [""] * self.ranks
        dist.all_gather_object(everywhere, wrong, group=self.channel.group)
        return next(
            (f"rank {rank}: {problem}" for rank, problem in enumerate(everywhere) if problem), ""
        )

    def recovers(self) -> bool:
        """Never: whether the other ranks failed too is not known; they may wait for this one."""
        return False

    def shutdown(self) -> None:
        """Ends the other ranks; in a copy of the process nothing."""
        if self.leads and self.running and not self._others.copied:
            self._release()
            self._others.end()

    def abandon(self) -> None:
        """No more calls: a step has failed, and the other ranks may wait in the middle of it."""
        self._release()  # the process group ends with the process
        if self.leads:
            self._others.give_up()

    def follow(self) -> None:
        """What other ranks do: the calls of rank 0, until it shuts down."""
        gc.collect()
        gc.freeze()  # else the collector takes seconds over all modules when the process ends
        # Ctrl-C in a terminal goes to all processes. Rank 0 then ends its sessions, for which it
        # needs the others; they notice when it has gone.
        with handling((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), signal.SIG_IGN):
            while self.running:
                self._follow(*self.channel.receive())
                for slot in self.slots.values():
                    slot.evictions.clear()  # rank 0 reports them

    def _follow(self, kind: Kind, numbers: list[int]) -> None:
        if kind is Kind.STEP:
            Engine.step(self, self.channel.receive_steps(numbers))
        elif kind is Kind.ENCODE:
            Engine.encode_pixels(self, self.channel.receive_pixels(numbers))
        else:
            function, arguments = self.channel.receive_call(numbers)
            function(self, *arguments)

    def agreed(self, kernels: Kernels) -> Kernels:
        """The kernels that have proven right on all ranks: their passes must have the same shapes.
        Rank 0 names a rank that lacks one. A collective."""
        others = Kernels()
        names = [field.name for field in fields(Kernels)]
        own = {name for name in names if getattr(kernels, name) is not getattr(others, name)}
        everywhere = [set[str]()] * self.ranks
        dist.all_gather_object(everywhere, own)
        lacking = dict[str, int]()
        for name in sorted(set[str]().union(*everywhere)):
            ranks = [rank for rank, has in enumerate(everywhere) if name not in has]
            if ranks:
                lacking[name] = ranks[0]
        if self.leads:
            for name, rank in lacking.items():
                log.warning("rank %d is without the kernel %s: so are all ranks", rank, name)
        return replace(kernels, **{name: getattr(others, name) for name in lacking})

    def open(self, sampling: Sampling | None = None) -> Slot:
        self.check_free()
        self.sampler.check(sampling)
        return self.on_all(Engine.open, sampling or Sampling())  # the same seed on every rank

    def set_sampling(self, slot: Slot, sampling: Sampling) -> None:
        self.sampler.check(sampling)
        self.on_all(Engine.set_sampling, slot, sampling)

    def close(self, slot: Slot) -> None:
        if not slot.closed:
            self.on_all(Engine.close, slot)

    def encode_pixels(self, pixels: Tensor) -> list[Tensor]:
        self._check_running()
        self.channel.send_pixels(pixels)
        return Engine.encode_pixels(self, pixels)

    def step(self, steps: Sequence[Step]) -> list[int | None]:
        self.check(steps)
        self._check_running()
        self.channel.send_steps(steps)
        return Engine.step(self, steps)

    def save(self, slot: Slot) -> dict[str, Any]:
        """The whole session, as one process would save it."""
        return self.on_all(ShardedEngine._gather, slot)

    def restore(self, state: dict[str, Any]) -> Slot:
        self.check_state(state)
        self.check_free()
        return self.on_all(ShardedEngine._restore, state)

    def check_state(self, state: dict[str, Any]) -> None:
        slot_state.check(state, self.cache, self.sampler, sinks=self.sinks, ranks=self.ranks)

    def _release(self) -> None:
        self.running = False
        # NCCL's communicator does not end before the graphs that have recorded its collectives.
        self.release_graphs()

    def _stop(self) -> None:
        self._release()
        _leave(self.lifeline)

    def _gather(self, slot: Slot) -> dict[str, Any]:
        own = Engine.save(self, slot)
        parts: list[Any] | None = [None] * self.ranks if self.leads else None
        dist.gather_object((own["text"], own["frames"]), parts, dst=0, group=self.channel.group)
        if parts is not None:
            # [layers, 2, KV heads, L, D]
            own["text"] = torch.cat([text for text, _ in parts], dim=2)
            own["frames"] = torch.cat([frames for _, frames in parts], dim=2)
        return own

    def _restore(self, state: dict[str, Any]) -> Slot:
        return self.fill(self._own(state))

    def _own(self, state: dict[str, Any]) -> dict[str, Any]:
        """This rank's KV heads of a saved session."""
        heads = self.cache.text.shape[3]
        own = {name: state[name].narrow(2, self.rank * heads, heads) for name in ("text", "frames")}
        return {**state, **own}

    def on_all(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs `function(self, *arguments)` on every rank; rank 0's result."""
        self._check_running()
        self.channel.send_call(function, arguments)
        return function(self, *arguments)

    def _check_running(self) -> None:
        if not self.running:
            raise RuntimeError("the other ranks have gone")


class _Others:
    """Tells the other ranks, once, that no more calls come. It does not refer to the engine, which
    may be gone by then."""

    def __init__(self, channel: Channel, lifeline: Lifeline) -> None:
        self._channel, self._lifeline = channel, lifeline
        self._lock, self._ended = ProcessLock(), False

    @property
    def copied(self) -> bool:
        """Whether this process is a copy (fork) of rank 0, with its connections."""
        return self._lock.copied

    def end(self) -> None:
        """Ends the other ranks, and the process group. Where another thread is at it, waits."""
        if self.copied:
            return
        with self._lock:
            if self._ended:
                return
            self._ended = True
            with suppress(RuntimeError):  # they have gone
                self._channel.send_call(ShardedEngine._stop, ())
            _leave(self._lifeline)

    def give_up(self) -> None:
        """Tells them nothing any more."""
        self._ended = True


def _leave(lifeline: Lifeline) -> None:
    lifeline.close()
    dist.destroy_process_group()  # else its threads may abort the process's exit


def _end_all(reference: weakref.ref[ShardedEngine], others: _Others) -> None:
    engine = reference()
    if engine is not None:
        engine.shutdown()
    else:
        others.end()
