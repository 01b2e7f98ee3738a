"""Steps of an engine on a simulated GPU: saves what the host asks of the device for each kind.

A graph is one launch, as its replay is, whatever it holds; what it holds runs all the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests import simulated_cuda

WINDOW, SESSIONS = 3, 4


class Replayed:
    """A captured computation that writes its result to where it was when it was captured."""

    def __init__(self, compute: Callable[[], Tensor | None]):
        self.compute, self.out = compute, compute()

    def replay(self) -> None:
        simulated_cuda.record.counts["launches"] += 1
        with simulated_cuda.as_one():
            new = self.compute()
            if self.out is not None and new is not None:
                self.out.copy_(new)


def main() -> None:
    torch.set_num_threads(1)
    simulated_cuda.install()
    torch.cuda.mem_get_info = lambda *_: (80 << 30, 80 << 30)  # type: ignore[assignment]
    used: list[int] = []
    torch.cuda.set_device = used.append  # type: ignore[assignment]
    from inference.engine.sampling import Sampling
    from inference.engine.slots import Step
    from tests.torchrun import save_result

    engine = make_engine()
    image, frames = engine.image_token, pictures()
    slots = [engine.open(Sampling()) for _ in range(SESSIONS)]
    for number, slot in enumerate(slots):
        tokens = [5, *[image] * WINDOW, 7 + number]
        engine.step([Step(slot, tokens, engine.encode(frames[:WINDOW]))])
    first, second, third, _ = slots
    features = engine.encode(frames)

    def framed(slot: Any, *tokens: int) -> Any:
        return Step(slot, [*tokens, image], [features[0]])

    drawn = Sampling(temperature=0.7, seed=1)
    penalized = Sampling(repetition_penalty=1.1, seed=1)
    biased = Sampling(min_p=0.1, temperature=0.7, frequency_penalty=0.5, logit_bias={5: 1.0})
    kinds: dict[str, Callable[[], Any]] = {
        "pictures": lambda: engine.encode(frames),
        "a token": lambda: engine.step([Step(first)]),
        "a token of each": lambda: engine.step([Step(slot) for slot in slots]),
        "a frame": lambda: engine.step([framed(first)]),
        "a frame of each": lambda: engine.step([framed(slot) for slot in slots]),
        "a question": lambda: engine.step([Step(first, [9] * 30)]),
        "a question with a frame": lambda: engine.step([framed(first, *[9] * 30)]),
        "a token, a frame, a question": lambda: engine.step(
            [Step(first), framed(second), Step(third, [9] * 30)]
        ),
        "settings": lambda: engine.set_sampling(first, drawn),
        "a token that is drawn": lambda: engine.step([Step(first)]),
        "settings of a context": lambda: engine.set_sampling(first, penalized),
        "a token that is penalized": lambda: engine.step([Step(first)]),
        "settings of tokens": lambda: engine.set_sampling(first, biased),
        "a token that is counted": lambda: engine.step([Step(first)]),
    }
    seen = {}
    for name, call in kinds.items():
        with simulated_cuda.recording() as seen[name]:
            call()
    runner = engine.graph_runner
    held = [*runner.passes.values(), *(graph for graph, _ in runner.draws.values())]
    graphs = [
        weakref.ref(graph) for graph in (*held, *(g for g, _ in engine.tower.graphs.values()))
    ]
    del runner, held
    engine.release_graphs()
    left = [graph for graph in graphs if graph() is not None]
    engine.step([Step(first), framed(second)])  # as before, without
    save_result("released", (len(graphs), len(left)))
    save_result("seen", seen)
    save_result("refused", refused())
    save_result("used", used)


class SimulatedPool:
    """In place of capture.Pool."""

    def __init__(self, device: torch.device, ranks: Any):
        assert device.type == "cuda"

    def capture(self, compute: Callable[[], Any]) -> tuple[Replayed, Any]:
        graph = Replayed(compute)
        return graph, graph.out


def make_engine(**options: Any) -> Any:
    """Its kernels are plain torch, with a choice of slots as Triton's have it."""
    from inference.engine.engine import Engine
    from inference.kernels.choose import Kernels
    from tests.inference.engine.streams import AnyRows
    from tests.inference.tiny import tiny_model

    with (
        mock.patch("inference.engine.graphs.Pool", SimulatedPool),
        mock.patch("inference.engine.tower_graphs.Pool", SimulatedPool),
        mock.patch("inference.engine.engine.choose", return_value=Kernels(attention=AnyRows)),
    ):
        return Engine(
            tiny_model().to("cuda"),
            window=WINDOW,
            **{"max_sessions": SESSIONS, "max_tokens": 256, **options},
        )


def refused() -> str:
    """What is said where sessions fit, and graphs beside them do not."""
    engine = make_engine()
    each, logits = engine.cache.sizes, engine.config.text_config.vocab_size
    free = 10 * (each.text + each.frames + 9 * logits)  # what is remembered of each token, 9 bytes
    with mock.patch.object(torch.cuda, "mem_get_info", return_value=(free, free)):
        try:
            make_engine(max_sessions=10)
        except ValueError as error:
            return str(error)
    return ""


def pictures() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 255, (SESSIONS, 3, 70, 40), generator=generator, dtype=torch.uint8)
    return list(drawn)


if __name__ == "__main__":
    main()
