"""The FLOP formulas against torch's FlopCounterMode, which watches the real model run."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from moss_train.config import ParallelConfig
from moss_train.convert.random_init import random_reader
from moss_train.convert.weights import fill
from moss_train.model.frame_plan import FramePlan, plan_frames
from moss_train.model.groups import Groups
from moss_train.model.loss import LossOptions, find_targets
from moss_train.model.moss_video import MossVideo
from moss_train.model.packed_text import PackedText
from moss_train.model_config import ModelConfig, ProjectorConfig, TextConfig, VisionConfig
from moss_train.train.flops import (
    Part,
    StepCounts,
    StepFlops,
    TrainedParts,
    count_microbatch,
    step_flops,
)

TILES, LENGTH, LABELS, IMAGE_AT = 2, 24, 17, ([2, 9, 10], [5])
PT1 = TrainedParts(vision=False, projector=True, decoder=False)
ALL = TrainedParts(vision=True, projector=True, decoder=True)
ATTENTION = {torch.ops.aten.bmm}  # all others are linear layers and convolutions


def small(pool: str = "average") -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(
            hidden_size=32, num_layers=3, num_global_layers=2, num_heads=4, mlp_size=48,
            image_size=56, patch_size=14, intermediate_layers=[0, 2], recompute=False,
        ),
        projector=ProjectorConfig(pool, 2),
        text=TextConfig(
            vocab_size=320, hidden_size=64, num_layers=6, cross_attention_layers=[1, 4],
            num_heads=4, num_kv_heads=2, mlp_size=96,
        ),
        dtype="fp32",
    )  # fmt: skip


class Measured:
    """One forward and backward pass; `kinds[phase]` counts "linear" and "attention" FLOPs."""

    def __init__(
        self,
        groups: Groups,
        model: ModelConfig,
        trained: TrainedParts,
        recompute: str = "none",
        image_at: tuple[list[int], ...] = IMAGE_AT,
    ):
        self.kinds: dict[str, Counter[str]] = {}
        self.trained, self.frames = trained, plan(image_at)
        self.model = MossVideo(model, ParallelConfig(recompute=recompute), groups)
        fill(self.model, random_reader(model, 1))
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(getattr(trained, name.split(".")[0]))
        with sdpa_kernel(SDPBackend.MATH), set_checkpoint_early_stop(False):
            if self.frames.count:
                self._with_frames()
            else:
                self._decode()

    def _with_frames(self) -> None:
        """As a training step: the states are a leaf, whose gradient goes back to the encoder."""
        encoder, count = self.model.encoder, self.frames.count
        pixels, ratio_ids = torch.randn(count, TILES, 3, 56, 56), torch.full((count,), 2)
        with self._phase("vision forward"):
            features = encoder.features(pixels, ratio_ids)
        pooled = features.detach().requires_grad_(self.trained.vision)
        with self._phase("projector forward"):
            states = encoder.projector(pooled)
        self.frames.states = leaf = states.detach().requires_grad_(self.trained.states)
        self._decode()
        if self.trained.states:
            with self._phase("projector backward"):
                states.backward(leaf.grad)
        if self.trained.vision:
            with self._phase("vision backward"):
                features.backward(pooled.grad)

    def _decode(self) -> None:
        tokens, labels = torch.randint(0, 320, (2 * LENGTH,)), torch.full((2, LENGTH), -100)
        labels[0, 12:], labels[1, 15:20] = 7, 8
        text = PackedText(tokens, [LENGTH, LENGTH])
        targets = find_targets(labels.flatten(), text.lengths, LossOptions(11, 0.1))
        with self._phase("decoder forward"):
            loss = self.model.chunks[0](text, self.frames, targets, torch.tensor(LABELS))
        with self._phase("decoder backward"):
            loss.backward()

    def _phase(self, name: str) -> _Phase:
        return _Phase(self.kinds.setdefault(name, Counter()))

    def total(self) -> int:
        return sum(kinds.total() for kinds in self.kinds.values())

    def counts(self) -> StepCounts:
        """What is computed: masked pairs of both attentions included."""
        tokens, pairs = 2 * LENGTH, 2 * LENGTH**2
        attending = len(self.frames.tokens)
        return StepCounts(self.frames.count, self.frames.pairs, attending, tokens, pairs, LABELS)

    def check(self, name: str, part: Part) -> None:
        for phase in ("forward", "backward"):
            seen = self.kinds.get(f"{name} {phase}", Counter())
            assert getattr(part, phase) == seen.total(), (name, phase)


def plan(image_at: tuple[list[int], ...]) -> FramePlan:
    rows = [row for row, positions in enumerate(image_at) for _ in positions]
    positions = torch.tensor([p for row in image_at for p in row], dtype=torch.int64)
    rows_of_frames = torch.tensor(rows, dtype=torch.int64)
    return plan_frames(rows_of_frames, positions, [LENGTH, LENGTH], 2 * LENGTH, max_tiles=TILES)


class _Phase(FlopCounterMode):
    def __init__(self, kinds: Counter[str]):
        super().__init__(display=False)
        self.kinds = kinds

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        for operator, flops in self.get_flop_counts()["Global"].items():
            self.kinds["attention" if operator in ATTENTION else "linear"] += flops


@pytest.mark.parametrize(
    ("pool", "trained"),
    [
        ("average", PT1),
        ("channel_fusion", PT1),
        ("average", ALL),
        ("channel_fusion", ALL),
        ("average", TrainedParts(vision=True, projector=True, decoder=False)),
        ("average", TrainedParts(vision=True, projector=False, decoder=False)),
        ("average", TrainedParts(vision=False, projector=True, decoder=True)),
    ],
)
def test_every_part_counts_what_the_model_computes(groups, pool, trained):
    measured = Measured(groups, small(pool), trained)
    flops = step_flops(small(pool), trained, measured.counts(), TILES)

    measured.check("vision", flops.vision)
    measured.check("projector", flops.projector)
    linear = flops.decoder_linear + flops.head
    attention = flops.self_attention + flops.cross_attention
    for phase in ("forward", "backward"):
        seen = measured.kinds[f"decoder {phase}"]
        assert seen["attention"] > 0
        assert getattr(linear, phase) == seen["linear"]
        assert getattr(attention, phase) == seen["attention"]
    assert flops.total == measured.total()
    assert flops.recomputed == 0


def test_a_frozen_tower_runs_forward_only():
    flops = step_flops(small(), PT1, StepCounts(frames=3, attended=9, tokens=9, labels=2), TILES)
    assert flops.vision.forward > 0
    assert flops.vision.backward == 0


def test_a_row_without_frames_skips_cross_attention_and_the_frozen_decoder_s_backward(groups):
    measured = Measured(groups, small(), ALL, image_at=([], []))
    computed = StepCounts(text_tokens=48, text_pairs=2 * LENGTH**2, text_labels=LABELS)
    flops = step_flops(small(), ALL, computed, TILES)
    assert flops.total == measured.total()
    assert flops.cross_attention == Part()
    assert step_flops(small(), PT1, computed, TILES).model.backward == 0


def test_without_a_gradient_for_the_frames_their_k_and_v_projections_have_weights_only(groups):
    trained = TrainedParts(vision=False, projector=False, decoder=True)
    measured = Measured(groups, small(), trained)
    counts = measured.counts()
    flops = step_flops(small(), trained, counts, TILES)
    computed = measured.kinds["decoder backward"]
    assert flops.decoder_linear.backward + flops.head.backward == computed["linear"]
    attention = flops.self_attention.backward + flops.cross_attention.backward
    assert attention == computed["attention"]


@pytest.mark.parametrize("trained", [PT1, ALL])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_what_recomputation_runs_again_is_counted_apart(groups, recompute, trained):
    measured = Measured(groups, small(), trained, recompute)
    plain = step_flops(small(), trained, measured.counts(), TILES)
    flops = step_flops(small(), trained, measured.counts(), TILES, recompute)
    assert (flops.recomputed > 0) == (recompute == "full")  # selective: no products
    assert flops.total == plain.total
    assert flops.total + flops.recomputed == measured.total()


def test_a_trainable_tower_that_recomputes_runs_forward_twice_and_the_projector_too():
    model = small()
    model.vision.recompute = True
    flops = step_flops(model, ALL, StepCounts(frames=2), TILES)
    assert flops.recomputed == flops.vision.forward + flops.projector.forward
    assert step_flops(model, PT1, StepCounts(frames=2), TILES).recomputed == 0


def test_frames_whose_activations_are_kept_run_forward_once():
    model = small()
    model.vision.recompute = True
    flops = step_flops(model, ALL, StepCounts(frames=5), TILES, kept_frames=3)
    assert flops.recomputed == step_flops(model, ALL, StepCounts(frames=2), TILES).recomputed > 0
    assert flops.total == step_flops(model, ALL, StepCounts(frames=5), TILES).total
    assert step_flops(model, ALL, StepCounts(frames=5), TILES, kept_frames=5).recomputed == 0


def test_a_token_of_the_11b_model_costs_two_flops_a_weight_of_llama_8b():
    counts = StepCounts(text_tokens=1, text_labels=1)
    flops = step_flops(ModelConfig(), ALL, counts)
    # 8,030,261,248 weights less the embedding's and the 65 norms'
    weights = 8_030_261_248 - 128_256 * 4096 - 65 * 4096
    assert flops.decoder_linear.forward + flops.head.forward == 2 * weights
    assert flops.total == 6 * weights


def test_attention_of_the_11b_model_by_hand():
    # one frame of one tile: 1608 positions, 40 layers; 101 vision tokens, 8 layers
    flops = step_flops(ModelConfig(), PT1, StepCounts(frames=1, attended=10, pairs=55))
    linear = 2 * 1608 * (4 * 1280**2 + 2 * 1280 * 5120) * 40 + 2 * 1600 * 3 * 14**2 * 1280
    assert flops.vision == Part(linear + 4 * 1608**2 * 1280 * 40)
    assert flops.projector == Part(2 * 101 * 7680 * 4096, 2 * 101 * 7680 * 4096)
    pairs = 10 * 101
    assert flops.cross_attention.forward == 8 * 4 * pairs * 4096
    # the first cross-attention layer's queries need no gradient
    assert flops.cross_attention.backward == (7 * 4 + 3) * 2 * pairs * 4096
    # nor do the three layers below it
    assert flops.self_attention == Part(32 * 4 * 55 * 4096, 29 * 8 * 55 * 4096)


def test_counts_of_a_microbatch_leave_padding_out_and_keep_text_rows_apart():
    frames = plan_frames(torch.tensor([0, 0]), torch.tensor([2, 5]), [8, 4], 16)
    counts = count_microbatch([8, 4], torch.tensor([5, 6, 7, 8, 11]), frames)
    assert counts == StepCounts(2, 9, 6, 8, 36, 3, 4, 10, 2)  # 2..7 see a frame, 5..7 two


def test_counts_and_flops_add_up():
    one = StepCounts(1, 2, 3, 4, 5, 6, 7, 8)
    assert one + one == StepCounts(2, 4, 6, 8, 10, 12, 14, 16)
    flops = step_flops(small(), ALL, one)
    assert flops + flops == step_flops(small(), ALL, one + one)
    assert flops + StepFlops() == flops
