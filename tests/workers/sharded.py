"""Streams through an engine of several ranks; leaves what rank 0 made of it.

Arguments: checkpoint; what rank 1 does: `follow`, or `die` at the second step.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

import torch

from inference.engine.engine import Engine
from inference.engine.fork import fork
from inference.engine.load import RankFinished, load_engine
from inference.engine.sampling import Sampling
from inference.engine.slots import Step
from tests.inference.engine.streams import Player, make_stream, play
from tests.torchrun import save_result


def scenario(checkpoint: str) -> dict[str, Any]:
    """Two streams side by side, one saved and restored on the way; then a sampled answer, and one
    that goes on from it."""
    engine = load_engine(checkpoint, device="cpu", window=3, max_sessions=2, max_tokens=64)
    players = [Player(engine, make_stream(seed, frames=4)) for seed in (1, 2)]
    play(engine, players, until=4)
    state = engine.save(players[0].slot)
    engine.close(players[0].slot)
    players[0].slot = engine.restore(state)
    play(engine, players)
    for player in players:
        engine.close(player.slot)
    slot = engine.open(Sampling(temperature=1.0, top_k=50, seed=9, repetition_penalty=1.2))
    sampled = engine.step([Step(slot, [1, 40, 50])])
    for _ in range(3):
        sampled += engine.step([Step(slot)])
    engine.set_sampling(slot, Sampling(temperature=2.0, seed=3))
    sampled += engine.step([Step(slot)])
    engine.step([Step(slot, [60], sample=False)])
    twin = engine.on_all(fork, slot, slot.sampling)
    both = engine.step([Step(slot, [70]), Step(twin, [70])])
    assert both[0] == both[1]
    sampled += both
    engine.shutdown()
    tensors = {name: state[name] for name in ("text", "frames")}
    return {"logits": [player.logits for player in players], "sampled": sampled, "state": tensors}


def main() -> None:
    checkpoint, part = sys.argv[1:]
    torch.set_num_threads(1)
    if part == "die" and os.environ["RANK"] == "1":
        _die_at_second_step()
    with contextlib.suppress(RankFinished):  # rank 1
        save_result("result", scenario(checkpoint))


def _die_at_second_step() -> None:
    step, calls = Engine.step, []

    def failing(self, steps):
        calls.append(steps)
        if len(calls) == 2:
            os._exit(3)
        return step(self, steps)

    Engine.step = failing  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
