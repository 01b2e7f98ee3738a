"""Streams through an engine of several ranks; leaves what rank 0 made of it, and which messages
steps and pictures took.

Arguments: checkpoint; what rank 1 does: `follow`, or `die` at the second step. Then rank 0 waits
for it as a collective of NCCL would, and takes no notice of torchrun's signal. Or what is captured
in place of CUDA graphs, and how it fails on one rank alone: `capture`, `pass0`, `pass1`. Or
`forget`: rank 0 copies its process, which ends, asks, and forgets the model.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import signal
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.distributed as dist

import inference
from inference.engine.capture import ALONE, Ranks
from inference.engine.engine import Engine
from inference.engine.fork import fork
from inference.engine.load import RankFinished, load_engine
from inference.engine.lock_step import Channel, Kind
from inference.engine.sampling import Sampling
from inference.engine.slots import Step
from inference.kernels.choose import Kernels
from inference.session.runner import Runner
from tests.inference.engine.streams import AnyRows, Player, make_stream, play
from tests.torchrun import OUT, save_result
from tests.waiting import until


def _refuse_other_model(engine: Engine, state: dict[str, Any]) -> None:
    """A session of a model that has in all as many KV heads as a rank has here: no rank may begin
    with it."""
    half = {name: state[name].chunk(2, dim=2)[0] for name in ("text", "frames")}
    with contextlib.suppress(ValueError):
        engine.restore(state | half)
        raise AssertionError("a saved session of another model was taken")


def scenario(checkpoint: str) -> dict[str, Any]:
    """Two streams side by side, one saved and restored on the way; then a sampled answer, and one
    that goes on from it."""
    engine = load_engine(checkpoint, device="cpu", window=3, max_sessions=2, max_tokens=640)
    players = [Player(engine, make_stream(seed, frames=4)) for seed in (1, 2)]
    play(engine, players, until=4)
    state = engine.save(players[0].slot)
    engine.close(players[0].slot)
    _refuse_other_model(engine, state)
    players[0].slot = engine.restore(state)
    play(engine, players)
    for player in players:
        engine.close(player.slot)
    picture = torch.rand(3, 56, 56, generator=torch.Generator().manual_seed(4))
    sampled, tokens = list[int | None](), [1, *range(40, 60), engine.image_token, 50]
    for attend_all in (False, True):
        slot = engine.open()
        sampled += engine.step(
            [Step(slot, tokens, engine.encode([picture]), attend_all=attend_all)]
        )
        sampled += [token for _ in range(3) for token in engine.step([Step(slot)])]
        engine.close(slot)
    assert sampled[:4] != sampled[4:]
    everything = Sampling(
        temperature=1.0, top_k=50, min_p=0.01, seed=9, repetition_penalty=1.2,
        presence_penalty=0.5, frequency_penalty=0.5, logit_bias={9: 3.0, 80: -100.0},
    )  # fmt: skip
    slot = engine.open(everything)
    sampled += engine.step([Step(slot, [1, 40, 50])])
    messages: dict[str, list[str]] = {}
    for _ in range(2):
        with told() as messages["a token"]:
            sampled += engine.step([Step(slot)])
    with told() as messages["a picture"]:
        features = engine.encode([picture])
    with told() as messages["a frame"]:
        sampled += engine.step([Step(slot, [engine.image_token], features)])
    allowed = torch.zeros(17, dtype=torch.int32)
    allowed[2] = 1 << 7  # token 71 alone
    with told() as messages["a mask"]:
        sampled += engine.step([Step(slot, allowed=allowed, likely=2)])
    assert sampled[-1] == 71
    with told() as messages["a long prompt"]:
        sampled += engine.step([Step(slot, [30 + n % 200 for n in range(300)])])
    engine.set_sampling(slot, Sampling(temperature=2.0, seed=3))
    sampled += engine.step([Step(slot)])
    engine.step([Step(slot, [60], sample=False)])
    twin = engine.on_all(fork, slot, slot.sampling)
    both = engine.step([Step(slot, [70]), Step(twin, [70])])
    assert both[0] == both[1]
    sampled += both
    freed = ended(engine)
    tensors = {name: state[name] for name in ("text", "frames")}
    assert not any("CALL" in kinds for kinds in messages.values())  # which are pickled
    return {
        "messages": messages,
        "logits": [player.logits for player in players],
        "sampled": sampled,
        "state": tensors,
        "freed": freed,
    }


def ended(engine: Engine) -> bool | None:
    """Shuts it down. Whether a graph of its tower was freed when the process group ended, for which
    NCCL would wait then; None where there is no group."""
    engine.tower.graphs[0] = mock.Mock(), torch.empty(0)
    graph, freed = weakref.ref(engine.tower.graphs[0][0]), None
    destroy = dist.destroy_process_group

    def destroying() -> None:
        nonlocal freed
        freed = graph() is None
        destroy()

    with mock.patch.object(dist, "destroy_process_group", destroying):
        engine.shutdown()
    return freed


@contextmanager
def told() -> Iterator[list[str]]:
    """What rank 0 sends meanwhile: kinds of messages, and how many broadcasts in all."""
    seen: list[str] = []
    send, broadcast = Channel._send, dist.broadcast

    def sending(self: Channel, kind: Kind, numbers: Any) -> None:
        seen.append(kind.name)
        send(self, kind, numbers)

    def broadcasting(*arguments: Any, **named: Any) -> Any:
        seen.append("broadcast")
        return broadcast(*arguments, **named)

    with (
        mock.patch.object(Channel, "_send", sending),
        mock.patch.object(dist, "broadcast", broadcasting),
    ):
        yield seen


def main() -> None:
    checkpoint, part = sys.argv[1:]
    torch.set_num_threads(1)
    if part in ("capture", "pass0", "pass1"):
        with contextlib.suppress(RankFinished), _whole_exit():
            _capture(checkpoint, part)
        return
    if part == "forget":
        with contextlib.suppress(RankFinished):
            return _forget(checkpoint)
        return save_result("over", True)
    if part == "die":
        _die_at_second_step() if os.environ["RANK"] == "1" else _hang_in_a_failed_step()
    with contextlib.suppress(RankFinished):  # rank 1
        save_result("result", scenario(checkpoint))


def _forget(checkpoint: str) -> None:
    """Leaves an answer that was given after a copy of this process has ended, and that the engine
    is gone and the other rank at its end, while this one goes on."""
    model = inference.load(checkpoint, device="cpu", window=3, max_tokens=640)
    engine = weakref.ref(model.runner.engine)
    child = os.fork()
    if not child:
        sys.exit(0)
    os.waitpid(child, 0)  # how it ends is gloo's affair, whose threads it has not
    answer = model.chat("Who?", max_new_tokens=2)
    del model
    over = Path(os.environ[OUT]) / "over.rank1.pt"
    until(lambda: gc.collect() is not None and engine() is None and over.exists())
    save_result("forgotten", type(answer).__name__)


class Recorded:
    """In place of a graph: computes again, to where the result was when it was captured."""

    def __init__(self, compute: Callable[[], Any], scale: float):
        self.compute, self.scale, self.out = compute, scale, compute()

    def replay(self) -> None:
        new = self.compute()
        if self.out is not None:
            self.out.copy_(new * self.scale)


class FailingPool:
    """In place of capture.Pool, on a CPU. `plan`: how each capture of this rank goes, in turn:
    `capture`: it fails; `wrong`: the graph computes something else; `pass`: the pass fails before
    its first collective; `wait`: it waits there, as in one of NCCL; others go well."""

    plan: ClassVar[list[str]] = []

    def __init__(self, device: torch.device, ranks: Ranks = ALONE):
        self.ranks = ranks

    def capture(self, compute: Callable[[], Any]) -> tuple[Recorded, Any]:
        how = self.plan.pop(0) if self.plan else ""
        if how == "pass":
            raise RuntimeError("the pass itself fails")
        while how == "wait":
            time.sleep(1)

        def record() -> tuple[Recorded, Any]:
            graph = Recorded(compute, 2.0 if how == "wrong" else 1.0)
            if how == "capture":
                raise RuntimeError("operation not permitted when stream is capturing\nat line 3")
            return graph, graph.out

        return self.ranks.together(record)


def _capture(checkpoint: str, part: str) -> None:
    """An engine whose captures fail on rank 1: of passes at the third, of frames at the second;
    leaves how many graphs each rank has, and a session that speaks when the program ends. Or whose
    first pass fails on one rank, while the other one waits."""
    kernels, rank = Kernels(attention=AnyRows), os.environ["RANK"]
    if part != "capture":
        FailingPool.plan = ["pass"] if part.endswith(rank) else ["wait"]
    elif rank == "1":
        # After a failure nothing more of that kind is captured: the next one is the tower's.
        FailingPool.plan = ["", "", "capture", "", "wrong"]
    if rank == "0":
        kernels = replace(kernels, swiglu=lonely)
    with (
        mock.patch("inference.engine.graphs.Pool", FailingPool),
        mock.patch("inference.engine.tower_graphs.Pool", FailingPool),
        mock.patch("inference.engine.engine.choose", return_value=kernels),
        mock.patch("inference.engine.engine.devices.has_graphs", return_value=True),
    ):
        engine = load_engine(checkpoint, device="cpu", window=3, max_sessions=2, max_tokens=640)
    engine.on_all(leave_graphs)
    talk = Sampling(silence_bias=-100.0)
    session = Runner(engine).session(sampling=talk, pace=None, max_new_tokens=None)
    session.prompt("Talk.")
    next(event for event in session.events() if event.type == "response.output_text.delta")


@contextmanager
def _whole_exit() -> Iterator[None]:
    """Where a rank fails, what a process does at its end is done; a fork would not do it."""
    try:
        yield
    except RuntimeError:
        traceback.print_exc()
        atexit._run_exitfuncs()
        raise


def lonely(x: torch.Tensor) -> torch.Tensor:
    """A kernel that one rank alone has."""
    raise AssertionError("the other rank is without it")


def leave_graphs(engine: Engine) -> None:
    runner = engine.graph_runner
    assert runner is not None
    save_result("graphs", [len(runner.passes), len(runner.draws), len(engine.tower.graphs)])


def _die_at_second_step() -> None:
    step, calls = Engine.step, []

    def failing(self, steps):
        calls.append(steps)
        if len(calls) == 2:
            os._exit(3)
        return step(self, steps)

    Engine.step = failing  # type: ignore[method-assign]


def _hang_in_a_failed_step() -> None:
    step = Engine.step
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def failing(self, steps):
        try:
            return step(self, steps)
        except RuntimeError:
            time.sleep(1000)
            raise

    Engine.step = failing  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
