"""The streaming engine: several sessions in one model, a token or a frame at a time.

    engine = load_engine("checkpoint")  # inference.engine.load
    slot = engine.open(Sampling())
    [token] = engine.step([Step(slot, tokens=prompt)])
    [frame] = engine.encode([image])
    [token] = engine.step([Step(slot, tokens=[engine.image_token], frames=[frame])])
    [token] = engine.step([Step(slot)])

A step forwards a slot's pending token (the one sampled last) and what is appended to it, samples
one token, which becomes pending. Steps of several slots are one pass. See docs/engine.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data_pipeline import devices
from inference.engine import slot_state
from inference.engine.cache import KVCache, make_room, sizes_of_slot
from inference.engine.capture import ALONE, Ranks
from inference.engine.choose_attend import set_up
from inference.engine.decode import sizes_of
from inference.engine.engine_config import EngineConfig
from inference.engine.graph_memory import GraphMemory
from inference.engine.graphs import GraphRunner
from inference.engine.packed_runner import PackedRunner
from inference.engine.preprocess import Pixels
from inference.engine.quantize import use_kernels
from inference.engine.sampling import NO_TOKEN, Sampler, Sampling, bytes_of_slot
from inference.engine.slots import FrameRing, Mark, Slot, Step, check_steps
from inference.engine.tower_fp8 import round_tower
from inference.engine.tower_graphs import BATCHES, Tower
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from inference.kernels.choose import Kernels, choose

VISION_BATCH = BATCHES[-1]  # frames that the vision tower encodes at once


class EngineFull(RuntimeError):
    """All slots are taken."""


class Engine:
    """A model with `max_sessions` slots. Synchronous; one thread owns it: the one that
    has made it, or another that says `claim`.

    Args:
        model: whole, or this rank's slice.
        processor: its tokenizer and its image mean and deviation are used; None: token ids and
            normalized pixels only.
        config: `changes` are fields of it.
    """

    def __init__(
        self,
        model: MossVideoForConditionalGeneration,
        processor: Any = None,
        config: EngineConfig | None = None,
        **changes: Any,
    ):
        options = replace(config or EngineConfig(), **changes)
        self.model, self.config, self.processor = model.eval(), model.config, processor
        self.tokenizer: Any = None if processor is None else processor.tokenizer
        decoder = model.model.language_model
        self.device = decoder.embed_tokens.weight.device
        self.dtype = decoder.embed_tokens.weight.dtype
        self.claim()
        self.window, self.sinks, self.max_tokens = options.window, options.sinks, options.max_tokens
        self.max_sessions = options.max_sessions
        self.attend_all = options.tokens_before_first_frame == "attend_all"
        self.image_token: int = self.config.image_token_index
        self.silence_token = self._token("<|silence|>", self.config.silence_token_id)
        self.end_of_turn = self._token("<|eot_id|>", None)
        self.slots: dict[int, Slot] = {}
        special = self.silence_token, self.image_token, self.end_of_turn
        attend = set_up(model, options.attention)
        if options.vision_dtype == "fp8":
            round_tower(model)
        eight_bit = options.kv_dtype == "fp8"
        each = sizes_of_slot(
            decoder, max_tokens=self.max_tokens, window=self.window, dtype=self.dtype,
            eight_bit=eight_bit,
        )  # fmt: skip
        sizes, kind = sizes_of(decoder, each), "torch" if options.compile else options.kernels
        kernels = self.agreed(choose(kind, self.device, self.dtype, sizes, attend.fixed))
        graphs = options.graphs and devices.has_graphs(self.device)
        expected = (
            GraphMemory.of(model, sizes, each, self.max_sessions, kernels) if graphs else None
        )
        vocabulary = self.config.text_config.vocab_size
        sampling, peak = bytes_of_slot(vocabulary), expected.peak if expected else 0
        each.check(self.max_sessions, self.device, sampling, peak)
        self.cache = KVCache(
            decoder, each, slots=self.max_sessions, device=self.device, dtype=self.dtype,
            eight_bit=eight_bit,
        )  # fmt: skip
        if eight_bit:
            self._scale_frames()
        self.sampler = Sampler(self.max_sessions, vocabulary, self.silence_token, self.device)
        self.packed = PackedRunner(
            model, self.cache, self.sampler, attend, special, attend_all=self.attend_all
        )
        self.graph_runner: GraphRunner | None = None
        if graphs or options.compile or kernels.any_rows:
            self.graph_runner = self.make_graph_runner(kernels, graphs, options.compile)
        self.pixels = Pixels(self.config, processor, self.device)
        self.tower = Tower(self._encode, self.pixels.size, self.device)
        ranks = self.meet()
        if self.graph_runner is not None and expected is not None:
            with expected.reported(self.device):
                self.graph_runner.capture(ranks)
                self.tower.capture(ranks)

    def claim(self) -> None:
        """Makes the calling thread the engine's owner from now on."""
        devices.use(self.device)

    def release_graphs(self) -> None:
        """Frees all graphs: passes, and the vision tower, run without from now on."""
        if self.graph_runner is not None:
            self.graph_runner.release()
        self.tower.graphs.clear()

    def make_graph_runner(self, kernels: Kernels, graphs: bool, compile: bool) -> GraphRunner:
        """What runs passes of fixed shape of this engine's slots, made of `kernels`."""
        use_kernels(self.model, kernels)
        return GraphRunner(
            self.model,
            self.cache,
            self.sampler,
            self.slots,
            kernels,
            attend_all=self.attend_all,
            graphs=graphs,
            compile=compile,
        )

    def agreed(self, kernels: Kernels) -> Kernels:
        """The kernels of passes of fixed shape, where each of several ranks has chosen its own."""
        return kernels

    def meet(self) -> Ranks:
        """Who shares the model: from now on all end where one does."""
        return ALONE

    def recovers(self) -> bool:
        """Whether a step that failed may be tried again. Not on a device that does nothing any
        more: after an illegal access or an uncorrectable memory error, CUDA refuses all further
        work of the process, and only another process can go on."""
        try:
            devices.synchronize(self.device)
        except RuntimeError:
            return False
        return True

    def shutdown(self) -> None:
        """Ends the other ranks under torchrun. Calling it is optional: it is done at exit."""

    def abandon(self) -> None:
        """No more calls, after a failure from which the engine does not recover."""

    def on_all(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs `function(self, *arguments)`, on every rank."""
        return function(self, *arguments)

    def open(self, sampling: Sampling | None = None) -> Slot:
        """Takes a free slot.

        Raises:
            EngineFull: there is none.
            ValueError: `logit_bias` names what is no token that can be sampled.
        """
        self.check_free()
        self.sampler.check(sampling)
        return self.take(sampling)

    def check_free(self) -> None:
        """Raises EngineFull if no slot is free."""
        if len(self.slots) == self.max_sessions:
            raise EngineFull(f"all {self.max_sessions} sessions are in use")

    def take(self, sampling: Sampling | None) -> Slot:
        free = set(range(self.max_sessions)) - set(self.slots)
        slot = Slot(min(free), sampling or Sampling(), FrameRing(self.window, self.sinks))
        self.slots[slot.index] = slot
        self.cache.reset(slot)
        self.sampler.open(slot.index, slot.sampling)
        return slot

    def set_sampling(self, slot: Slot, sampling: Sampling) -> None:
        """Changes how the slot's next tokens are sampled. Raises ValueError as `open` does."""
        self.sampler.check(sampling)
        slot.sampling = sampling
        self.sampler.set(slot.index, sampling)
        if sampling.repetition_penalty != 1:
            pending = [] if slot.pending is None else [slot.pending]
            self.sampler.add_context(slot.index, [*slot.tokens, *pending])

    def close(self, slot: Slot) -> None:
        """Gives the slot back. Closing it twice is not an error."""
        if not slot.closed:
            slot.closed = True
            del self.slots[slot.index]
            if slot.broken:
                self.cache.clear(slot)

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image | Tensor]) -> list[Tensor]:
        """Vision and projector: features `[P, H]` of each picture, on the device.

        A picture is a PIL image, uint8 `[3, h, w]` of any size, or normalized floats of the
        vision tower's size `[3, h, w]`.
        """
        features: list[Tensor] = []
        for start in range(0, len(images), VISION_BATCH):
            features += self.encode_pixels(self.pixels(images[start : start + VISION_BATCH]))
        return features

    @torch.inference_mode()
    def encode_pixels(self, pixels: Tensor) -> list[Tensor]:
        """Features of one batch of normalized pictures `[n, 1, 3, h, w]`."""
        return list(self.tower(pixels).unbind())

    @torch.inference_mode()
    def _scale_frames(self) -> None:
        """Chooses the scales of frames' keys and values in 8 bits."""
        size = self.config.vision_config.image_size
        noise = torch.randn(1, 1, 3, size, size, generator=torch.Generator().manual_seed(0))
        self.cache.scale_frames(self._encode(noise.to(self.device))[0].to(self.dtype))

    def _encode(self, pixels: Tensor) -> Tensor:
        ones = torch.ones(len(pixels), dtype=torch.long, device=self.device)
        return self.model.model.encode(pixels, ones, ones[:, None].bool())

    @torch.inference_mode()
    def step(self, steps: Sequence[Step]) -> list[int | None]:
        """Forwards `[pending] + tokens` of each slot, and samples a token of each.

        Frames that arrive when the ring is full replace the oldest ones. Replaced frames and
        dropped text are appended to `Slot.evictions`.

        Returns:
            The sampled tokens, which are pending now; None where `sample` is False, and of a slot
            that is `broken` now, because its logits are NaN.

        Raises:
            ValueError: before anything has changed, if a step is not possible.
            Exception: a pass failed. The slots are as they were before, so that each step can be
                tried again, or `broken`, which takes no step any more.
        """
        self.check(steps)
        if not steps:
            return []
        for step in steps:
            if step.slot.sampling.repetition_penalty != 1:
                self.sampler.add_context(step.slot.index, step.tokens)
        results: list[int | None] = []
        marks = [step.slot.mark() for step in steps]
        try:
            sampled = self._forward(steps)
        except Exception:
            for step, mark in zip(steps, marks, strict=True):
                self._undo(step.slot, mark)
            raise
        for step in steps:
            step.slot.pending = sampled[step.slot.index] if step.sample else None
            if step.slot.pending == NO_TOKEN:
                step.slot.pending, step.slot.broken = None, True
            if step.slot.pending is not None:
                self.sampler.add_sampled(step.slot.index, step.slot.pending, step.slot.sampling)
            results.append(step.slot.pending)
        return results

    def _forward(self, steps: Sequence[Step]) -> dict[int, int]:
        """The sampled tokens by slot. Steps of fixed shape go by kind, each a pass of its own: one
        session's prompt or frame does not take the others out of their graph. The host waits once,
        for the tokens of all passes."""
        kinds, rest, slots, tokens = list[list[Step]](), list(steps), list[int](), list[Tensor]()
        if self.graph_runner is not None:
            kinds, rest = self.graph_runner.divide(steps)
        # First what takes memory, and may not get it: the others are then as they were.
        sampled = self.packed.run(rest) if rest else None
        if sampled is not None:
            tokens.append(sampled)
            slots += [step.slot.index for step in rest if step.sample]
        for kind in kinds:
            assert self.graph_runner is not None
            for step in kind:
                make_room(self.cache, step.slot, len(step.inputs), self.packed.special)
            drawn = self.graph_runner.run(kind)
            if drawn is not None:
                tokens.append(drawn)
                slots += [step.slot.index for step in kind]
        return dict(zip(slots, torch.cat(tokens).tolist() if tokens else [], strict=True))

    def _undo(self, slot: Slot, mark: Mark) -> None:
        slot.undo(mark)
        try:
            self.cache.write_views(slot)
        except Exception:  # the device takes nothing any more
            slot.broken = True

    def free_memory(self) -> None:
        """Gives back what the allocator keeps for later, after a step that found too little."""
        devices.release_memory(self.device)

    def save(self, slot: Slot) -> dict[str, Any]:
        """All of a slot, on the CPU, for `restore` in this engine or another of the same model,
        window and sinks. torch.save can write it."""
        return slot_state.state_of(slot, self.sampler, self.cache)

    def restore(self, state: dict[str, Any]) -> Slot:
        """A new slot that continues where `save` was called.

        Raises:
            EngineFull: no slot is free.
            ValueError: the state is of another model or other sizes.
        """
        self.check_state(state)
        self.check_free()
        return self.fill(state)

    def fill(self, state: dict[str, Any]) -> Slot:
        """A new slot with a state that fits; of several ranks, with this one's heads."""
        slot = self.take(Sampling(**state["sampling"]))
        slot_state.fill(slot, state, self.sampler, self.cache)
        return slot

    def _token(self, text: str, fallback: int | None) -> int | None:
        if self.tokenizer is None:
            return fallback
        token = self.tokenizer.convert_tokens_to_ids(text)
        return fallback if token is None else token

    def check(self, steps: Sequence[Step]) -> None:
        """Raises ValueError for steps that are not possible."""
        embedding = self.model.model.language_model.embed_tokens.weight
        check_steps(
            steps,
            max_tokens=self.max_tokens,
            vocabulary=len(embedding),
            image_token=self.image_token,
            frame_shape=(self.cache.patches, self.config.text_config.hidden_size),
        )

    def check_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a state of another model or other sizes."""
        slot_state.check(state, self.cache, self.sampler, sinks=self.sinks)
