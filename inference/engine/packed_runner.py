"""Passes over any number of tokens of several slots: prompts that are long, and, where there are no
passes of fixed shape (graphs.py), everything."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

import torch
from torch import Tensor

from inference.engine.attend import Attend
from inference.engine.cache import KVCache, make_room, put_frames
from inference.engine.packed_batch import PackedBatch, Segment
from inference.engine.sampling import Sampler, draw_of
from inference.engine.slots import Slot, Step
from inference.engine.token_choice import choose_tokens
from inference.engine.unplanned_attention import unplanned_attention
from inference.engine.upload import upload
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration

LONGEST_PASS = 1024  # tokens of a slot in one pass: bounds the mask over many frames


class PackedRunner:
    """Runs steps of any shape.

    Args:
        special: silence, `<|image|>` and the end of a turn, as `tokens_to_keep` takes them.
        attend_all: EngineConfig's tokens_before_first_frame.
    """

    def __init__(
        self,
        model: MossVideoForConditionalGeneration,
        cache: KVCache,
        sampler: Sampler,
        attend: Attend,
        special: tuple[int | None, int, int | None],
        *,
        attend_all: bool,
    ):
        self.model, self.cache, self.sampler, self.attend = model, cache, sampler, attend
        self.special, self.attend_all = special, attend_all

    def run(self, steps: Sequence[Step]) -> Tensor | None:
        """Passes until all tokens are in: the tokens of the steps that sample one, on the device;
        None where no step samples."""
        waiting = [(step, step.inputs, step.frames) for step in steps]
        last: dict[int, Tensor] = {}  # hidden state of a slot's last token
        while waiting:
            parts, following = [], []
            for step, tokens, frames in waiting:
                count, images = self._fitting(step, tokens)
                parts.append((step.slot, tokens[:count], frames[:images]))
                if count < len(tokens):
                    following.append((step, tokens[count:], frames[images:]))
            attend_all = {step.slot.index for step, *_ in waiting if step.attend_all}
            last |= self.forward(parts, attend_all)
            waiting = following
        steps = [step for step in steps if step.sample]
        if not steps:
            return None
        slots = [step.slot for step in steps]
        logits = self.model.lm_head(torch.stack([last[slot.index] for slot in slots]))
        numbers = [[slot.index for slot in slots], [slot.position for slot in slots]]
        where, at = upload(numbers, self.cache.device)
        operations = draw_of(slot.sampling for slot in slots)
        draw = partial(self.sampler, logits, where, at, operations)
        return choose_tokens(logits, steps, range(len(steps)), draw)

    def _fitting(self, step: Step, tokens: list[int]) -> tuple[int, int]:
        """How many tokens and frames go into the next pass: no more frames than the ring takes."""
        room, images = step.slot.ring.room, 0
        # Tokens before the first frame attend frames that follow them: all in one pass.
        whole = self.attend_all or step.attend_all
        longest = len(tokens) if whole else min(len(tokens), LONGEST_PASS)
        for count, token in enumerate(tokens[:longest]):
            if token == self.special[1]:
                if images == room:
                    return count, images
                images += 1
        return longest, images

    def forward(
        self,
        parts: Sequence[tuple[Slot, list[int], Sequence[Tensor]]],
        attend_all: Collection[int] = (),
    ) -> dict[int, Tensor]:
        """Runs one pass over some tokens and frames of each slot. Returns the hidden state `[H]` of
        each slot's last token, by the slot's index. attend_all: the indices of slots whose step
        says so."""
        for slot, tokens, _ in parts:
            make_room(self.cache, slot, len(tokens), self.special)
        segments = []
        for slot, tokens, frames in parts:
            whole = self.attend_all or slot.index in attend_all
            first = whole and slot.ring.count == 0
            if frames:
                put_frames(self.cache, slot, tokens, frames)
            segments.append(Segment(slot, len(tokens), first))
        packed = PackedBatch(self.cache, segments, self.attend)
        ids, positions = list[int](), list[int]()
        for slot, tokens, _ in parts:
            ids += tokens
            positions += range(slot.position, slot.position + len(tokens))
        decoder = self.model.model.language_model
        inputs, at = upload([[ids], [positions]], self.cache.device)
        with unplanned_attention:
            x = decoder(decoder.embed_tokens(inputs), at, packed.tokens, packed.frames)[0]  # [N, H]
        last_hidden, end = {}, 0
        for slot, tokens, _ in parts:
            end += len(tokens)
            last_hidden[slot.index] = x[end - 1]
            slot.append(tokens)
            self.cache.commit_eviction(slot)
        return last_hidden
