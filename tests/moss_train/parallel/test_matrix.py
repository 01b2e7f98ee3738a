"""Every layout trains like one process: real processes over gloo, 8 steps of what is mixed, 4 of
one kind of samples, frozen tower or not."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from tests.gates import with_gates_together
from tests.torchrun import run_ranks
from tests.workers.matrix import CASES, STEPS
from tools.differences import largest

LAYOUTS: dict[int, dict[str, dict]] = {
    1: {"single": {}},
    2: {
        "tp2": {"tensor": 2},
        "pp2": {"pipeline": 2},
        "dp2": {},
        "tp2_sp": {"tensor": 2, "sequence": True},
        "pp2_vp2": {"pipeline": 2, "virtual": 2},
    },
    4: {"tp2_pp2": {"tensor": 2, "pipeline": 2}},
}
# Options that change how a layout computes, not what: one kind of run is enough.
VARIANTS: dict[int, dict[str, dict]] = {
    1: {
        "full_recompute": {"recompute": "full", "accumulate": True},
        "selective": {"recompute": "selective", "accumulate": True},
        # Other accumulation, and microbatches without a frame.
        "micro_batch_of_1": {"micro": 1, "accumulate": True},
        "micro_batch_of_4": {"micro": 4},
        "kept_frames": {"kept_frames": 6},
        "rounded": {"round_lengths": "on"},
    },
    2: {
        "tp2_vision": {
            "tensor": 2,
            "vision_tensor": True,
            "accumulate": True,
            "kept_frames": 6,
        },
        "pp2_full_recompute": {"pipeline": 2, "recompute": "full"},
        "dp2_overlap": {
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
            "accumulate": True,
            "kept_frames": 3,
        },
    },
    4: {
        "dp2_pp2_vp2_overlap": {
            "pipeline": 2,
            "virtual": 2,
            "micro": 1,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
        },
        "dp2_tp2_sp": {"tensor": 2, "sequence": True, "accumulate": True},
        "rounded_tp2_sp_pp2": {
            "tensor": 2,
            "sequence": True,
            "pipeline": 2,
            "recompute": "full",
            "round_lengths": "on",
        },
        "pp4": {"pipeline": 4, "kept_frames": 3},
        "dp2_tp2_vision": {"tensor": 2, "vision_tensor": True, "kept_frames": 3},
        "tp2_vision_pp2": {"tensor": 2, "vision_tensor": True, "pipeline": 2, "kept_frames": 3},
    },
}
BF16: dict[int, dict[str, dict]] = {
    1: {"bf16": {"dtype": "bf16"}},
    4: {"bf16_tp2_pp2": {"dtype": "bf16", "tensor": 2, "pipeline": 2}},
}
# Each linear layer has two parameters more then: one of them sliced, the other whole.
LORA = {1: ["fewer"], 2: ["tp2", "tp2_sp", "pp2", "dp2"]}
# Counts of labels by state, over microbatches, stages and replicas, weigh the loss.
BALANCED = {
    1: ["fewer", "micro_batch_of_1", "full_recompute"],
    2: ["tp2", "tp2_sp", "pp2_vp2", "dp2_overlap"],
    4: ["dp2_tp2_sp", "dp2_pp2_vp2_overlap"],
}
FEWER = 4  # steps of variants
FEWEST = 2
SINGLE_KIND = 4  # steps of texts alone, images alone, clips alone
SMALL_RUNS = [("all", "mixed"), ("pt1", "mixed"), ("pt1", "text")]
REPLICATED = ("q_norm", "k_norm", "gate", "norm", "projector", "vision_model")

Load = Callable[[str, str, str], dict]


@pytest.fixture(scope="module")
def load(tmp_path_factory) -> Load:
    """Runs everything once: three starts of torchrun, then results by layout and case."""
    out = tmp_path_factory.mktemp("matrix")
    for world, layouts in LAYOUTS.items():
        small = VARIANTS[world] | BF16.get(world, {})
        runs = []
        for name, layout in layouts.items():
            runs.append((name, layout, [case for case in CASES if case[1] == "mixed"]))
            one_kind = [case for case in CASES if case[1] != "mixed"]
            runs.append((name, layout | {"steps": SINGLE_KIND}, one_kind))
        runs += [(name, layout | {"steps": FEWER}, SMALL_RUNS) for name, layout in small.items()]
        if world == 1:
            runs.append(("fewer", {"steps": FEWER}, SMALL_RUNS))
        runs += [
            (name, layouts.get(name, {}) | {"steps": FEWER}, [("lora", "mixed")])
            for name in LORA.get(world, [])
        ]
        runs += [
            (name, (layouts | small).get(name, {}) | {"steps": FEWEST}, [("balanced", "mixed")])
            for name in BALANCED[world]
        ]
        arguments = json.dumps(runs)
        result = run_ranks("tests/workers/matrix.py", world, arguments, out=out, timeout=600)

    def read(layout: str, train: str, kind: str) -> dict:
        return result.load(f"{layout}-{train}-{kind}")

    return read


def names(table: dict[int, dict[str, dict]]) -> list[str]:
    return [name for layouts in table.values() for name in layouts if name != "single"]


WITH_LORA = [(layout, "lora", "mixed") for layout in LORA[2]]
ALL = [(layout, *case) for layout in names(LAYOUTS) for case in CASES]
ALL += [(layout, *case) for layout in names(VARIANTS) for case in SMALL_RUNS]


@pytest.mark.parametrize(("layout", "train", "kind"), ALL + WITH_LORA)
def test_layout_trains_like_a_single_process(
    load: Load, layout: str, train: str, kind: str
) -> None:
    reference = "single" if layout in names(LAYOUTS) and train != "lora" else "fewer"
    ours, single = load(layout, train, kind), load(reference, train, kind)
    assert ours["losses"][0] == pytest.approx(single["losses"][0], rel=1e-6)
    assert ours["losses"] == pytest.approx(single["losses"], rel=1e-4)
    assert ours["norms"] == pytest.approx(single["norms"], rel=1e-3)
    assert ours["gradients"].keys() == single["gradients"].keys()
    assert _worst(ours["gradients"], single["gradients"]) < 1e-4
    assert _worst(ours["weights"], single["weights"]) < 1e-4
    assert _worst(ours["adapters"], single["adapters"]) < 1e-4
    assert ours["differing"] == []
    # One rank's copy of a norm of the tower was changed then, whichever ranks share the tower.
    assert ours["noticed"] == (["vision.norm_post.weight"] if ours["ranks"] > 1 else [])
    _check_shares(ours["encoded"], ours["shares"])


@pytest.mark.parametrize("layout", [n for own in BALANCED.values() for n in own][1:])
def test_balanced_states_weigh_the_same_in_every_layout(load: Load, layout: str) -> None:
    ours, single = load(layout, "balanced", "mixed"), load("fewer", "balanced", "mixed")
    plain = load("fewer", "all", "mixed")
    assert ours["losses"][0] == pytest.approx(single["losses"][0], rel=1e-6)
    assert ours["losses"] == pytest.approx(single["losses"], rel=1e-4)
    assert ours["weighted"][0] == pytest.approx(plain["losses"][0], rel=1e-6)
    assert _worst(ours["gradients"], single["gradients"]) < 1e-4
    assert _worst(ours["weights"], single["weights"]) < 1e-4


def test_kept_frames_change_no_loss(load: Load) -> None:
    """Of 8 frames in chunks of 3, on one rank, on two that share a tower, on two replicas with 1
    and 7, and on four stages with 2 each, which are one chunk."""
    ours, plain = load("kept_frames", "all", "mixed"), load("fewer", "all", "mixed")
    assert ours["losses"] == plain["losses"]
    assert all(torch.equal(ours["weights"][name], x) for name, x in plain["weights"].items())
    kept = {"fewer": 0, "kept_frames": 6, "tp2_vision": 6, "dp2_overlap": 4, "pp4": 8}
    kept |= {"dp2_tp2_vision": 4, "tp2_vision_pp2": 6}
    for layout, count in kept.items():
        assert load(layout, "all", "mixed")["kept"] == [count] * FEWER
        assert load(layout, "pt1", "mixed")["kept"] == [0] * FEWER


def test_rounded_lengths_have_the_losses_of_exact_ones(load: Load) -> None:
    exact = load("fewer", "all", "mixed")
    for layout in ("rounded", "rounded_tp2_sp_pp2"):
        ours = load(layout, "all", "mixed")
        assert ours["losses"] == pytest.approx(exact["losses"], rel=1e-6)
    ours, theirs = (
        with_gates_together(load(name, "all", "mixed")["gradients"])
        for name in ("rounded", "fewer")
    )
    assert _worst(ours, theirs) < 2e-6


def test_bf16_follows_fp32(load: Load) -> None:
    """Half-precision weights and activations, fp32 main weights and gradients."""
    exact = load("fewer", "all", "mixed")
    for layout in ("bf16", "bf16_tp2_pp2"):
        ours = load(layout, "all", "mixed")
        assert ours["losses"] == pytest.approx(exact["losses"], rel=1e-2)
        assert ours["losses"] != exact["losses"]
        assert ours["norms"] == pytest.approx(exact["norms"], rel=0.1)
        assert {gradient.dtype for gradient in ours["gradients"].values()} == {torch.float32}
        assert {weight.dtype for weight in ours["weights"].values()} == {torch.bfloat16}
        assert ours["differing"] == []


def test_single_process_learns_and_moves_only_what_trains(load: Load) -> None:
    for train, kind in CASES:
        run = load("single", train, kind)
        assert len(run["losses"]) == (STEPS if kind == "mixed" else SINGLE_KIND)
        assert run["losses"][-1] != run["losses"][0]
        moved = {n for n, g in run["gradients"].items() if g.abs().sum() > 0}
        assert any("lm_head" in n for n in moved)
        sees = kind != "text"
        assert any(n.startswith("vision_model") for n in moved) == (sees and train == "all")
        assert any("multi_modal_projector" in n for n in moved) == sees
        assert any("k_norm" in n for n in moved) == sees
        for part in REPLICATED if sees and train == "all" else ():
            assert any(part in n or "multi_modal" in n for n in moved)


def test_adapters_train_and_the_decoder_s_weights_do_not(load: Load) -> None:
    run = load("fewer", "lora", "mixed")
    assert len(run["adapters"]) > 30
    moved = {name for name, gradient in run["gradients"].items() if gradient.any()}
    assert {name for name in moved if "lora_" not in name} == {
        "multi_modal_projector.weight",
        "multi_modal_projector.bias",
    }
    assert moved >= run["adapters"].keys()


def test_each_rank_encodes_its_share(load: Load) -> None:
    encoded = load("tp2_pp2", "all", "video")["encoded"]
    assert {tuple(step) for step in encoded} == {(5, 5, 5, 5)}
    encoded = load("tp2_pp2", "all", "mixed")["encoded"]
    assert {tuple(step) for step in encoded} == {(2, 2, 2, 2)}
    encoded = load("dp2", "all", "mixed")["encoded"]  # [0, 1] and [5, 2] frames
    assert {tuple(step) for step in encoded} == {(1, 7)}


def _worst(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest relative difference of a tensor, by norm; tensors that are zero must be equal."""
    apart = []
    scale = max((float(t.norm()) for t in theirs.values()), default=0.0)
    if scale == 0:  # nothing has a gradient: pt1 on text alone
        return float(any(t.any() for t in ours.values()))
    for name, expected in theirs.items():
        difference = float((ours[name] - expected).norm())
        # A tensor whose numbers vanish beside all others is compared to 1e-6 of the largest.
        apart.append(difference / max(float(expected.norm()), 1e-6 * scale))
    return largest(apart)


def _check_shares(encoded: list[list[int]], shares: int) -> None:
    """Within one of even, among the ranks of each replica."""
    for step in encoded:
        ranks = len(step)
        if shares == ranks:
            assert max(step) - min(step) <= 1
