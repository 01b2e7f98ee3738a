"""The memory of graphs as it is counted from shapes, against what passes allocate: of models in
full size on torch's `meta` device, whose tensors have sizes and no memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inference.bench.models import random_model
from inference.engine.decode import sizes_of
from inference.engine.engine import Engine
from inference.engine.graph_memory import GraphMemory
from inference.engine.quantize import quantize_decoder
from inference.engine.sampling import DRAWS
from inference.engine.tower_graphs import BATCHES
from inference.hf.vision_moss_video import VisionAttention
from inference.kernels.choose import Kernels, choose
from inference.kernels.trials import Sizes

META = torch.device("meta")
LEAST, MOST = 0.99, 1.15  # of the count: what may be expected


class Peak(TorchDispatchMode):
    """The most bytes that tensors which are made inside have at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[tuple[StorageWeakRef, int]] = []
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if _is_tensor(x)}
        self.alive = [(ref, size) for ref, size in self.alive if not ref.expired()]
        for x in filter(_is_tensor, tree_leaves(out)):
            storage = x.untyped_storage()
            if storage._cdata not in given:
                self.alive.append((StorageWeakRef(storage), storage.nbytes()))
        self.bytes = max(self.bytes, sum(size for _, size in self.alive))
        return out


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


class NotLaunched:
    """A kernel that computes nothing: what is allocated for it is real."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *_, **__: None


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    pytest.importorskip("triton")
    from inference.kernels import triton_attention, triton_products, triton_rows

    for module, names in (
        (triton_attention, ("_attend_part", "_join_parts")),
        (triton_rows, ("_add_norm", "_swiglu", "_rotate_and_keep", "_norm_and_rotate")),
        (triton_products, ("_one_token", "_several_tokens", "_one_token_4", "_several_tokens_4")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, NotLaunched())
    return choose("triton", META, torch.bfloat16, Sizes(1, 1, 1, 1, 1, 1))


def engine_of(model: str, slots: int, quantize: str = "", **options: Any) -> Engine:
    made = random_model(model, META, torch.bfloat16)
    if quantize:
        quantize_decoder(made, quantize)
    return Engine(made, max_sessions=slots, kernels="torch", **options)


def expected_of(engine: Engine, kernels: Kernels) -> GraphMemory:
    sizes = sizes_of(engine.model.model.language_model, engine.cache.sizes)
    return GraphMemory.of(engine.model, sizes, engine.cache.sizes, engine.max_sessions, kernels)


def counted_passes(engine: Engine, kernels: Kernels) -> int:
    runner, slots = (
        engine.make_graph_runner(kernels, graphs=False, compile=False),
        engine.max_sessions,
    )
    runs: list[Callable[[], object]] = [
        partial(runner.compute, *kind) for kind in runner.shapes.kinds
    ]
    runs += [partial(runner._sample, slots, draw) for draw in DRAWS]
    peaks = []
    with torch.inference_mode():
        for run in runs:
            with Peak() as peak:
                run()
            peaks.append(peak.bytes)
    return max(peaks)


@pytest.mark.parametrize(
    ("model", "slots", "options"),
    [
        ("11b", 1, {}),
        ("11b", 16, {}),
        ("11b", 32, {"kv_dtype": "fp8"}),
        ("11b", 4, {"quantize": "int8"}),
        ("mid", 3, {"window": 8, "max_tokens": 300}),
    ],
)
def test_passes_of_kernels_take_what_is_expected(kernels, model, slots, options) -> None:
    engine = engine_of(model, slots, **options)
    counted = counted_passes(engine, kernels)
    assert LEAST * counted <= expected_of(engine, kernels).passes <= MOST * counted


@pytest.mark.parametrize(
    ("model", "slots", "options"),
    [
        ("11b", 1, {}),
        ("11b", 16, {}),
        ("mid", 2, {"kv_dtype": "fp8"}),
        ("mid", 1, {"quantize": "int8"}),
        ("mid", 1, {"quantize": "int4"}),
        ("mid", 3, {"window": 8, "max_tokens": 300}),
    ],
)
def test_passes_of_plain_torch_take_what_is_expected(model, slots, options) -> None:
    engine = engine_of(model, slots, **options)
    counted = counted_passes(engine, Kernels())
    assert LEAST * counted <= expected_of(engine, Kernels()).passes <= MOST * counted


@pytest.mark.parametrize("model", ["11b", "mid"])
def test_the_tower_takes_what_is_expected(model: str) -> None:
    engine = engine_of(model, 1)
    for module in engine.model.modules():
        if isinstance(module, VisionAttention):  # a kernel keeps no scores
            module.attend = lambda q, k, v, mask: torch.empty_like(q)
    side = engine.pixels.size
    pixels = torch.empty(BATCHES[-1], 1, 3, side, side, device=META)
    with Peak() as peak, torch.inference_mode():
        engine._encode(pixels)
    kept = sum(BATCHES) * engine.cache.patches * engine.config.text_config.hidden_size * 2
    counted, expected = peak.bytes + kept, expected_of(engine, Kernels()).tower
    assert LEAST * counted <= expected <= MOST * counted
