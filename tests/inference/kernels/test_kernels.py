"""Triton kernels against fp64, on a GPU or else in Triton's interpreter, and what uses them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from inference.engine.decode import sizes_of
from inference.engine.engine import Engine
from inference.engine.engine_config import EngineConfig
from inference.engine.graphs import SPARE
from inference.engine.quantize import quantize_decoder
from inference.engine.quantized_linear import FORMATS
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
    scales_of: dict[int, Tensor] = field(default_factory=dict)


def buffers(kv: int, width: int, dtype: torch.dtype, eight_bit: bool = False) -> Buffers:
    """Three slots: a ring that is about to replace a frame; an empty one; one with a frame that
    only later tokens see."""
    stored = torch.float8_e4m3fn if eight_bit else dtype
    scales = torch.exp2(numbers([[n - 3.0, n + 2.0] for n in range(kv)]).T.contiguous())  # [2, KV]
    first = [[30, 9, 20, 61], [NEVER] * 4, [3, 52, NEVER, NEVER]]
    last = [[NEVER, 61, NEVER, NEVER], [NEVER] * 4, [NEVER] * 4]
    return Buffers(
        {0: random(2, 3, kv, 150, width, seed=1).to(stored)},
        {1: random(2, 3, kv, 4 * 33, width, seed=2).to(stored)},
        numbers(first),
        numbers(last),
        33,
        {0: scales, 1: scales / 2} if eight_bit else {},
    )


def held(kept: Buffers, layer: int) -> Tensor:
    """What a layer's keys and values stand for `[2, slots, KV, L, D]`, in fp64."""
    numbers = {**kept.tokens_of, **kept.frames_of}[layer].double()
    scales = kept.scales_of.get(layer)
    return numbers if scales is None else numbers * scales.double()[:, None, :, None, None]


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
    ("kv", "group", "width", "count", "dtype", "eight_bit"),
    [
        (2, 4, 16, 1, torch.float32, False),
        (1, 1, 24, 2, torch.float32, False),  # a width that is no power of two
        (1, 8, 16, 9, torch.float32, False),  # queries of two tiles
        (1, 3, 32, 2, HALF, False),
        (1, 5, 16, 1, torch.float32, False),
        (2, 6, 16, 2, torch.float32, False),
        (1, 7, 16, 1, HALF, True),
        (2, 2, 16, 2, torch.float32, True),
        (2, 1, 24, 1, HALF, True),
        # Prompts of one slot: every class of length, some of them full.
        (1, 4, 16, 16, torch.float32, False),
        (1, 2, 16, 31, HALF, True),
        (1, 4, 24, 64, HALF, False),
        (1, 4, 16, SPARE, torch.float32, False),
    ],
)
def test_attention(
    kernels: Kernels,
    kv: int,
    group: int,
    width: int,
    count: int,
    dtype: torch.dtype,
    eight_bit: bool,
) -> None:
    kept = buffers(kv, width, dtype, eight_bit)
    slots = [(2, min(140, 150 - count), 51), (0, 70, 59), (1, 0, 0)][: 3 if count < 16 else 1]
    taken, lengths, positions = (numbers([*column]) for column in zip(*slots, strict=True))
    rows = Rows(taken, lengths, positions, count)
    q = random(len(slots) * count, kv * group, width, seed=3, dtype=dtype)
    attention = kernels.attention(kept, rows)
    tokens, frames = attention.tokens(0, q), attention.frames(1, q)
    key, place = torch.arange(150, device=DEVICE), torch.arange(4 * 33, device=DEVICE) // 33
    for row, (slot, length, position) in enumerate(slots):
        for new in range(count):
            n, at = row * count + new, position + new
            keys, values = held(kept, 0)[:, slot]
            close(tokens[n], exact_attention(q[n], keys, values, key <= length + new), dtype)
            seen = (kept.first[slot] <= at) & (at < kept.last[slot])
            assert attention.sees[row, new] == seen.any()
            keys, values = held(kept, 1)[:, slot]
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


def test_keys_and_values_are_kept_in_8_bits(kernels: Kernels) -> None:
    """Numbers that e4m3 has, times the scales: Triton's interpreter does not round them as GPUs do.
    What is more than it has becomes its largest, 448."""
    kept = buffers(2, 12, torch.float32, eight_bit=True)
    keys, values = kept.tokens_of[0].clone()
    rows, scales = Rows(numbers([2, 0]), numbers([7, 100]), numbers([0, 0]), 1), kept.scales_of[0]
    wanted = (30 * random(2, 10, 12)).to(keys.dtype).float()
    qkv = wanted.clone()
    qkv[:, 6:] *= scales.flatten()[:, None]
    qkv[0, -1, -1], wanted[0, -1, -1] = 1e6, 448
    unturned = torch.ones(2, 12, device=DEVICE), torch.zeros(2, 12, device=DEVICE)
    q = kernels.rotate_and_keep(qkv.flatten(1), unturned, keys, values, rows, scales)
    close(q, wanted[:, :6])
    before = kept.tokens_of[0].float()
    for buffer, was, new in zip(
        (keys, values), before, (wanted[:, 6:8], wanted[:, 8:]), strict=True
    ):
        was[2, :, 7], was[0, :, 100] = new
        assert torch.equal(buffer.float(), was)


@pytest.mark.parametrize("rotated", [True, False])
def test_heads_are_normed_and_rotated(kernels: Kernels, rotated: bool) -> None:
    q, weight, turn = random(2, 3 * 20), random(20, seed=1), rotation(2, 20)
    wanted = exact_norm(q.view(2, 3, 20), weight)
    got = kernels.norm_and_rotate(q, weight, 1e-5, turn if rotated else None)
    close(got, exact_rotation(wanted, *turn) if rotated else wanted)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("tokens", [1, 3, 70, 130])
def test_products_with_8_bit_weights(kernels: Kernels, tokens: int, kind: str) -> None:
    full, x, scale = random(45, 150), random(tokens, 150, seed=1), random(45, seed=2)
    weight = FORMATS[kind].store(full * 40)
    got = kernels.product8(x, weight, scale)
    close(got, x.double() @ weight.double().T * scale.double())


@pytest.mark.parametrize(
    ("tokens", "width", "dtype"),
    [
        (1, 150, torch.float32),  # a group and a part of one
        (1, 2100, torch.float32),  # more groups than are read at once
        (1, 50, HALF),  # less than half a group
        (3, 150, torch.float32),
        (70, 257, HALF),
        (130, 150, torch.float32),
    ],
)
def test_products_with_4_bit_weights(kernels: Kernels, tokens: int, width: int, dtype) -> None:
    """Numbers from -8 to 7, two a byte: a group's first 64 are the lower bits."""
    groups = -(-width // 128)
    numbers = torch.randint(-8, 8, (45, groups, 128), generator=torch.Generator().manual_seed(0))
    packed = (numbers[..., :64] + 8) + 16 * (numbers[..., 64:] + 8)
    x, scale = random(tokens, width, dtype=dtype), random(45, groups, seed=2, dtype=dtype)
    weight = (numbers.to(DEVICE).double() * scale.double()[..., None]).flatten(1)[:, :width]
    got = kernels.product4(x, packed.to(DEVICE, torch.uint8).flatten(1), scale)
    close(got, x.double() @ weight.T, dtype)


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
    assert len(sizes) == 25
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


def test_8_bit_weights_are_tried_in_the_form_that_they_have(
    kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPUs before Ada have no e4m3: their compiler refuses the kernel that does well with int8."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def without_fp8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        if weight.dtype.is_floating_point:
            raise ValueError("type fp8e4nv not supported in this architecture")
        return kernels.product8(x, weight, scale)

    old = Kernels(product8=without_fp8)
    for kind, product in (("int8", without_fp8), ("fp8", plain.product8)):
        model = tiny_model()
        quantize_decoder(model, kind)
        engine = Engine(model, max_tokens=48, window=2, kernels="torch")
        sizes = sizes_of(model.model.language_model, engine.cache.sizes)
        assert proven_ones(old, DEVICE, torch.float32, sizes).product8 is product


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
