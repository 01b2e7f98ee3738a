"""Which attention a job runs with, where `model.attention` leaves it open or names a kernel that
has to prove itself on this GPU first.

Proven and timed are forward and backward pass of the three places: text, tower, cross-attention.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from data_pipeline.attention_kinds import KINDS, able
from data_pipeline.kernel_proof import Case, Kernel, proven, remembered
from moss_train import hardware
from moss_train.config import ParallelConfig
from moss_train.log import log
from moss_train.model.agreement import agreed
from moss_train.model.attention import attend_packed, attend_whole, attention_core, frames_core
from moss_train.model.cross_attention import attend_blocks, attend_frames
from moss_train.model.frame_plan import FramePlan, plan_frames
from moss_train.model.groups import Groups
from moss_train.model.packed_text import PackedText
from moss_train.model.projector import pooled_tokens
from moss_train.model.transformer_config import decoder_config, vision_config
from moss_train.model.vision import rows_of_tile
from moss_train.model_config import ModelConfig
from moss_train.transfer import move

TOGETHER = {"te": ("megatron-core",)}  # through which a kind is called
FLASH_4 = "flash-attn-4"  # that FlexAttention may be computed by
MODULES = (  # whose code does
    "data_pipeline.flash",
    *(
        f"moss_train.model.{name}"
        for name in (
            "choose_attention",
            "attention",
            "cross_attention",
            "flex_attention",
            "frame_plan",
            "sdpa",
        )
    ),
)
# What is timed: text, frames that are encoded at once, and a clip of which each token sees more.
TEXT, ENCODED, CLIP = 2048, 8, 64
FRAMES = 64  # that the tower encodes for this much text


def choose_attention(model: ModelConfig, parallel: ParallelConfig, groups: Groups) -> ModelConfig:
    """`model` with the attention that it runs with: rank 0's choice, if it is right on all ranks,
    else sdpa. A collective.

    On a CPU auto is sdpa. On a GPU, sdpa is taken as it is; any other is compared with it once, and
    sdpa is taken in its place where it fails or differs; auto is the fastest of those that do not.
    Each choice is logged in a line.
    """
    if model.attention == "sdpa" or not hardware.on_accelerator():
        name = "sdpa" if model.attention == "auto" else model.attention
        return replace(model, attention=name)
    trial = Trial(model, parallel, groups)
    chosen = agreed("model.attention", lambda: [trial.choose()], trial.right)
    return replace(model, attention=chosen[0] if chosen else "sdpa")


def packages_of(name: str) -> tuple[str, ...]:
    """Whose versions matter to a kind of attention, by their names in an index."""
    return tuple(dict.fromkeys(("torch", KINDS[name].package, *TOGETHER.get(name, ()))))


class Trial:
    """The attention of a model's layers on this device."""

    def __init__(self, model: ModelConfig, parallel: ParallelConfig, groups: Groups):
        self.model, self.groups = model, groups
        self.device, self.dtype = hardware.device(), hardware.DTYPES[model.dtype]
        self.configs = {
            True: decoder_config(model, parallel),
            False: vision_config(model, parallel),
        }
        text, vision = model.text, model.vision
        tensor, towers = parallel.tensor, parallel.vision_slices
        self.text_heads = text.num_heads // tensor, text.num_kv_heads // tensor
        self.tower_heads = vision.num_heads // towers
        self.tower_width = vision.hidden_size // vision.num_heads
        self.shapes = (
            f"{self.dtype}, {self.text_heads} heads of {text.head_dim}, tower {self.tower_heads} "
            f"of {self.tower_width}, {pooled_tokens(model)} vision tokens"
        )

    def choose(self) -> str:
        """The name that `model.attention` stands for here."""
        configured = self.model.attention
        if configured != "auto":
            return configured if self._proven(configured) else "sdpa"
        right = ["sdpa", *self.right(self._installed())]
        if len(right) == 1:
            log.info("attention: sdpa (nothing else is installed, or right here)")
            return "sdpa"
        packages = sorted({package for name in right for package in packages_of(name)})
        times = remembered(
            self.device, "attention", f"{right}, {self.shapes}, {asdict(self.model)}", packages,
            MODULES, lambda: {name: self._milliseconds(name) for name in right},
        )  # fmt: skip
        fastest = min(right, key=lambda name: times[name])
        measured = ", ".join(f"{name} {times[name]:.1f} ms" for name in right)
        log.info("attention: %s (%s)", fastest, measured)
        return fastest

    def right(self, names: Iterable[str]) -> list[str]:
        """Those that compute what sdpa does."""
        return [name for name in names if name == "sdpa" or self._proven(name)]

    def _installed(self) -> list[str]:
        """What may be tried beside sdpa."""
        needs = self.model.attention_needs(hardware.TRAINS)
        return [name for name in able(needs) if name != "sdpa"]

    def _proven(self, name: str) -> bool:
        cases = self._cross_cases if name == "flex" else partial(self._core_cases, name)
        called, packages = f"model.attention={name}", packages_of(name)
        if name == "flex" and self.model.flex_backend == "flash":
            called, packages = f"{called} with model.flex_backend=flash", (*packages, FLASH_4)
        kernel = Kernel(called, self.shapes, packages, MODULES, cases)
        return proven(kernel, self.device)

    def _core_cases(self, name: str) -> Iterator[Case]:
        """Text that fills a kernel's tiles or does not, of one or several sequences; frames."""
        for lengths in ([512], [300, 33, 1, 150]):
            text = self._text(lengths)
            core = self._core(name, True)
            yield Case(
                f"text of {lengths} tokens",
                lambda q, k, v, text=text, core=core: core(q, k, v, text),
                lambda q, k, v, text=text: attend_packed(q, k, v, text),
                self._text_inputs(sum(lengths)),
            )
        core = self._core(name, False)
        for frames, tiles in ((2, 1), (1, self.model.vision.max_tiles)):
            yield Case(
                f"{frames} frames of {tiles} tiles",
                lambda q, k, v, core=core: core(q, k, v, None),
                lambda q, k, v: attend_whole(q, k, v, None),
                self._tower_inputs(name, frames, tiles),
            )
        frames_of = frames_core(name)
        if frames_of is not None:
            inputs = self._frames([600], 2, 1, "sdpa")  # 200 tokens see one frame, 200 both
            yield Case(
                "frames that all tokens of a block see",
                lambda q, k, v: attend_frames(q, k, v, self._masked(inputs, q), frames_of),
                lambda q, k, v: attend_frames(q, k, v, self._masked(inputs, q)),
                self._cross_inputs(inputs),
            )

    def _cross_cases(self) -> Iterator[Case]:
        """Streams, clips, several of them, tiles that are not real, what FlexAttention compiles."""
        backend = self.model.flex_backend
        for lengths, frames, tiles in (([300], 40, 1), ([170, 90, 161], 30, 1), ([260], 7, 4)):
            flex, blocks = (self._frames(lengths, frames, tiles, name) for name in ("flex", "sdpa"))
            yield Case(
                f"text of {lengths} tokens, {frames} frames of {tiles} tiles",
                lambda q, k, v, plan=flex: attend_frames(q, k, v, plan, None, backend),
                lambda q, k, v, plan=blocks: attend_blocks(q, k, v, self._masked(plan, q)),
                self._cross_inputs(flex),
            )

    def _milliseconds(self, name: str) -> float:
        """Milliseconds of attention in a microbatch of a clip and text, summed over a model's
        layers."""
        text, frames = self._text([TEXT]), self._frames([TEXT], CLIP, 1, name)
        cores = self._core(name, True), self._core(name, False), frames_core(name)
        cross = len(self.model.text.cross_attention_layers)
        inputs = self._cross_inputs(frames)
        frames = self._masked(frames, inputs[0])  # once for all layers, as in a model
        tower = self.model.vision.num_layers + self.model.vision.num_global_layers
        parts = (
            (self.model.text.num_layers - cross, self._text_inputs(TEXT),
             lambda q, k, v: cores[0](q, k, v, text)),
            (cross, inputs,
             lambda q, k, v: attend_frames(q, k, v, frames, cores[2])),
            (tower * FRAMES / ENCODED, self._tower_inputs(name, ENCODED, 1),
             lambda q, k, v: cores[1](q, k, v, None)),
        )  # fmt: skip
        return sum(layers * _milliseconds(run, inputs) for layers, inputs, run in parts)

    def _core(self, name: str, text: bool):
        groups = self.groups.decoder if text else self.groups.vision
        return attention_core(name, self.configs[text], groups, 1, text=text)

    def _text(self, lengths: list[int]) -> PackedText:
        text = PackedText(torch.zeros(sum(lengths), dtype=torch.long), lengths)
        move(text)
        return text

    def _frames(self, lengths: list[int], frames: int, tiles: int, name: str) -> FramePlan:
        """Frames that appear one after the other over all texts; every second has one tile."""
        starts = [0, *accumulate(lengths)]
        places = torch.arange(1, frames + 1) * starts[-1] // (frames + 1)
        rows = torch.bucketize(places, torch.tensor(starts[1:]), right=True)
        plan = plan_frames(
            rows, places - torch.tensor(starts)[rows], lengths, starts[-1],
            tiles=1 + (torch.arange(frames) % 2) * (tiles - 1), max_tiles=tiles,
            attend_all=self.model.tokens_before_first_frame == "attend_all",
            flex=pooled_tokens(self.model) if name == "flex" else None,
        )  # fmt: skip
        plan.padded = None
        move(plan)
        return plan

    def _masked(self, plan: FramePlan, query: Tensor) -> FramePlan:
        """The plan with masks in the dtype of `query`, which in the exact reference is another
        one."""
        return plan.with_masks(self.model.text.shared_heads, pooled_tokens(self.model), query.dtype)

    def _text_inputs(self, tokens: int) -> tuple[Tensor, ...]:
        query, kv = self.text_heads
        width = self.model.text.head_dim
        return self._draw((tokens, query, width), *2 * [(tokens, kv, width)])

    def _tower_inputs(self, name: str, frames: int, tiles: int) -> tuple[Tensor, ...]:
        vision = self.model.vision
        rows = tiles * rows_of_tile(vision, name)[0]
        shape = (frames, rows, self.tower_heads, self.tower_width)
        return self._draw(shape, shape, shape)

    def _cross_inputs(self, frames: FramePlan) -> tuple[Tensor, ...]:
        query, kv = self.text_heads
        width = self.model.text.head_dim
        keys = (*frames.tiles.shape[:1], frames.tiles.shape[1] * pooled_tokens(self.model))
        return self._draw((len(frames.tokens), query, width), *2 * [(*keys, kv, width)])

    def _draw(self, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
        generator = torch.Generator(self.device).manual_seed(1)
        return tuple(
            torch.randn(shape, generator=generator, device=self.device).to(self.dtype)
            for shape in shapes
        )


def _milliseconds(run, inputs: tuple[Tensor, ...], times: int = 5) -> float:
    """Milliseconds of a forward and backward pass: the fastest of `times`, after two that plan and
    compile."""
    leaves = [x.requires_grad_() for x in inputs]
    best = float("inf")
    for number in range(times + 2):
        hardware.synchronize()
        began = time.perf_counter()
        out = run(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        hardware.synchronize()
        if number > 1:
            best = min(best, 1e3 * (time.perf_counter() - began))
    return best
