"""Triton kernels against fp64, on a GPU or else in Triton's interpreter, and what uses them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from inference.engine.engine import Engine, EngineConfig
from inference.engine.quantize import FORMATS
from inference.engine.slots import Step
from inference.kernels import plain
from inference.kernels.choose import Kernels, choose, proven_ones
from inference.kernels.rows import Rows
from inference.kernels.trials import Sizes
from tests.conftest import REPO
from tests.inference.engine.streams import Player, largest_error, make_stream, offline, play
from tests.inference.tiny import tiny_model

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Triton's interpreter computes products of bf16 numbers as if they were integers.
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
NEVER = 2**40


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return choose("triton", DEVICE, torch.float32, Sizes(1, 1, 1, 1, 1, 1))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def numbers(values: list) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def close(got: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float32) -> None:
    error = (got.double() - wanted.double()).abs().max()
    assert error <= TOLERANCE[dtype] * wanted.double().abs().max()


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()


def exact_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Of `[N, heads, D]`, as complex numbers; both halves of cosines and sines are alike."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    turned = pairs * torch.complex(cos[:, None, :half].double(), sin[:, None, :half].double())
    return torch.cat((turned.real, turned.imag), -1)


def rotation(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    angles = random(tokens, width // 2, seed=9)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


@dataclass
class Buffers:
    tokens_of: dict[int, Tensor]
    frames_of: dict[int, Tensor]
    first: Tensor
    last: Tensor
    patches: int


def buffers(kv: int, width: int, dtype: torch.dtype) -> Buffers:
    """Three slots: a ring that is about to replace a frame; an empty one; one with a frame that
    only later tokens see."""
    first = [[30, 9, 20, 61], [NEVER] * 4, [3, 52, NEVER, NEVER]]
    last = [[NEVER, 61, NEVER, NEVER], [NEVER] * 4, [NEVER] * 4]
    return Buffers(
        {0: random(2, 3, kv, 150, width, seed=1, dtype=dtype)},
        {1: random(2, 3, kv, 4 * 33, width, seed=2, dtype=dtype)},
        numbers(first),
        numbers(last),
        33,
    )


def exact_attention(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """One token's `[heads, D]` over `[KV, L, D]`, of which it sees `seen` `[L]`; in fp64."""
    if not seen.any():
        return torch.zeros(q.numel(), dtype=torch.float64, device=q.device)
    group = len(q) // len(keys)
    rows = []
    for head, query in enumerate(q.double()):
        k, v = keys[head // group][seen].double(), values[head // group][seen].double()
        rows.append((k @ query / len(query) ** 0.5).softmax(0) @ v)
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("kv", "group", "width", "count", "dtype"),
    [
        (2, 4, 16, 1, torch.float32),
        (1, 1, 24, 2, torch.float32),  # a width that is no power of two
        (1, 8, 16, 9, torch.float32),  # queries of two tiles
        (1, 3, 32, 2, HALF),
    ],
)
def test_attention(
    kernels: Kernels, kv: int, group: int, width: int, count: int, dtype: torch.dtype
) -> None:
    kept = buffers(kv, width, dtype)
    rows = Rows(numbers([2, 0, 1]), numbers([140, 70, 0]), numbers([51, 59, 0]), count)
    q = random(3 * count, kv * group, width, seed=3, dtype=dtype)
    attention = kernels.attention(kept, rows)
    tokens, frames = attention.tokens(0, q), attention.frames(1, q)
    key, place = torch.arange(150, device=DEVICE), torch.arange(4 * 33, device=DEVICE) // 33
    for row, (slot, length, position) in enumerate([(2, 140, 51), (0, 70, 59), (1, 0, 0)]):
        for new in range(count):
            n, at = row * count + new, position + new
            keys, values = kept.tokens_of[0][:, slot]
            close(tokens[n], exact_attention(q[n], keys, values, key <= length + new), dtype)
            seen = (kept.first[slot] <= at) & (at < kept.last[slot])
            assert attention.sees[row, new] == seen.any()
            keys, values = kept.frames_of[1][:, slot]
            close(frames[n], exact_attention(q[n], keys, values, seen[place]), dtype)


def test_the_norm_of_a_sum(kernels: Kernels) -> None:
    x, branch, weight, scale = random(3, 70), random(3, 70, seed=1), random(70, seed=2), random(3)
    for added, factor in ((None, None), (branch, None), (branch, scale)):
        changed = x.clone()
        got = kernels.add_norm(changed, added, factor, weight, 1e-5)
        wanted = x.double()
        if added is not None:
            wanted = wanted + added.double() * (1 if factor is None else factor.double()[:, None])
        close(changed, wanted)
        close(got, exact_norm(wanted, weight))


def test_swiglu(kernels: Kernels) -> None:
    gate_up = random(2, 2 * 1100)
    gate, up = gate_up.double().chunk(2, -1)
    close(kernels.swiglu(gate_up), gate / (1 + (-gate).exp()) * up)


def test_queries_are_rotated_and_keys_and_values_are_kept(kernels: Kernels) -> None:
    kv, heads, width, count = 2, 6, 12, 3
    before = buffers(kv, width, torch.float32).tokens_of[0]
    keys, values = before.clone()
    rows = Rows(numbers([2, 0]), numbers([7, 100]), numbers([0, 0]), count)
    qkv = random(2 * count, (heads + 2 * kv) * width)
    turn = rotation(2 * count, width)
    q = kernels.rotate_and_keep(qkv, turn, keys, values, rows)
    split = qkv.view(2 * count, -1, width)
    close(q, exact_rotation(split[:, :heads], *turn))
    wanted_keys, wanted_values = before.double()
    turned = exact_rotation(split[:, heads : heads + kv], *turn)
    for n in range(2 * count):
        slot, place = [(2, 7), (0, 100)][n // count]
        wanted_keys[slot, :, place + n % count] = turned[n]
        wanted_values[slot, :, place + n % count] = split[n, heads + kv :].double()
    close(keys, wanted_keys)
    close(values, wanted_values)


@pytest.mark.parametrize("rotated", [True, False])
def test_heads_are_normed_and_rotated(kernels: Kernels, rotated: bool) -> None:
    q, weight, turn = random(2, 3 * 20), random(20, seed=1), rotation(2, 20)
    wanted = exact_norm(q.view(2, 3, 20), weight)
    got = kernels.norm_and_rotate(q, weight, 1e-5, turn if rotated else None)
    close(got, exact_rotation(wanted, *turn) if rotated else wanted)


@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_products_with_8_bit_weights(kernels: Kernels, tokens: int) -> None:
    full, x, scale = random(45, 150), random(tokens, 150, seed=1), random(45, seed=2)
    weight = FORMATS["int8"].store(full * 40)
    got = kernels.product8(x, weight, scale)
    close(got, x.double() @ weight.double().T * scale.double())


def test_a_stream_through_the_kernels_equals_one_pass_over_the_whole() -> None:
    """A prompt, a token, and a frame that replaces another."""
    text = tiny_model().config.text_config.to_dict()
    text |= {"num_hidden_layers": 2, "cross_attention_layers": [1], "num_key_value_heads": 1}
    model = tiny_model(text_config=text).to(DEVICE)
    stream = make_stream(1, frames=3)
    engine = Engine(model, max_tokens=48, window=2, kernels="triton", max_sessions=2)
    engine.open()  # the stream is in the second slot
    player = Player(engine, stream)
    play(engine, [player])
    assert len(player.logits) > 5
    positions = stream.image_positions

    def sees(t: int, f: int) -> bool:
        arrived = sum(p <= t for p in positions)
        return arrived - 2 <= f < arrived

    assert largest_error(player, offline(model, stream, sees)) < 1e-4


def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """The interpreter takes what a GPU's compiler does not."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.workers.compile_kernels"],
        cwd=REPO, env=env | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(sizes) == 11
    assert min(sizes) > 1000


def test_only_what_computes_what_torch_does_is_used(
    kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sizes = Sizes(hidden=24, inner=40, heads=2, kv_heads=1, head_dim=16, patches=9)
    wrong = replace(kernels, swiglu=lambda gate_up: 1.01 * kernels.swiglu(gate_up))
    for _ in range(2):
        chosen = proven_ones(wrong, DEVICE, torch.float32, sizes)
        assert chosen == replace(kernels, swiglu=plain.swiglu)
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 2
    assert lines[0].startswith("the kernel swiglu is not used on")


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """Operators that are a kernel each: those that return a view, or memory, are none."""

    NONE = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view")
    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        view = any(a.alias_info and not a.alias_info.is_write for a in function._schema.arguments)
        self.count += not (view or function._schema.name in self.NONE)
        return function(*arguments, **(named or {}))


def test_a_token_of_the_11b_decoder_is_at_most_500_launches() -> None:
    """As many layers, in small. Each operation of kernels.choose is one launch, attention two; what
    else torch does is counted."""
    text = tiny_model().config.text_config.to_dict()
    text |= {"num_hidden_layers": 40, "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38]}
    model = tiny_model(text_config=text)
    counting = Counting()

    def counted(function, launches: int = 1):
        def run(*arguments):
            with torch.utils._python_dispatch._disable_current_modes():
                out = function(*arguments)
            counting.count += launches
            return out

        return run

    class Attention(plain.Attention):
        tokens = counted(plain.Attention.tokens, 2)
        frames = counted(plain.Attention.frames, 2)

    one_each = {
        name: counted(getattr(plain, name))
        for name in ("add_norm", "swiglu", "rotate_and_keep", "norm_and_rotate", "product8")
    }
    engine = Engine(model, max_tokens=64, window=2, kernels="torch")
    chosen = Kernels(**one_each, attention=Attention)
    engine.graph_runner = engine.make_graph_runner(chosen, graphs=False, compile=False)
    slot = engine.open()
    engine.step([Step(slot, [5, 6, 7])])
    counting.count = 0
    with counting, torch.inference_mode():
        engine.graph_runner._pass(1, 1)
    assert 350 < counting.count <= 500


def test_the_kernels_are_chosen_by_name() -> None:
    assert choose("auto", torch.device("cpu"), torch.float32, Sizes(1, 1, 1, 1, 1, 1)) == Kernels()
    with pytest.raises(ValueError, match="kernels=cuda: allowed: auto, triton, torch"):
        choose("cuda", torch.device("cpu"), torch.float32, Sizes(1, 1, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="kernels"):
        EngineConfig(kernels="cuda")  # type: ignore[arg-type]
