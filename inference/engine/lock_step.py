"""What rank 0 tells the other ranks before each call of an engine.

A message is whole numbers in a fixed layout. A step is one message of `WORDS` numbers, unless its
prompts are long; tensors whose sizes it gives follow it: features of frames, masks of tokens. So do
pictures. Other calls (open, close, save, ...) come between steps and are rare: their function and
arguments are pickled.

Numbers go from host to host: a rank must know there which pass comes, and one that waits for hours
for the next call leaves its GPU idle, which a collective of NCCL would keep busy. Tensors of a
device go from there.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from inference.engine.slots import Slot, Step

IDLE = timedelta(days=3650)  # other ranks wait for the next call without a time limit
WORDS = 256  # of a message: a token of 32 slots, or a short prompt
HEAD = 2  # numbers before a message's own: its kind, and how many follow
STEP = 8  # numbers of a step before its tokens
NONE = -1


class Kind(IntEnum):
    """The kind of a message."""

    CALL = 0  # bytes of a pickle
    STEP = 1  # steps
    ENCODE = 2  # pictures


class Channel:
    """Messages from rank 0 to all other ranks. All ranks make it at once.

    Args:
        device, dtype: of the engine's tensors.
        slots: this rank's open slots by index.
        frame: shape of a frame's features. picture: shape of normalized pixels.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        slots: Mapping[int, Slot],
        frame: Sequence[int],
        picture: Sequence[int],
    ) -> None:
        self.group = dist.new_group(backend="gloo", timeout=IDLE)
        self.device, self.dtype, self.slots = device, dtype, slots
        self.frame, self.picture = tuple(frame), tuple(picture)

    def share(self, numbers: Sequence[int]) -> list[int]:
        """Rank 0's numbers; as many on each rank."""
        shared = torch.tensor(numbers)
        dist.broadcast(shared, src=0, group=self.group)
        return list(shared.tolist())

    def send_steps(self, steps: Sequence[Step]) -> None:
        """Sends, on rank 0, what `receive_steps` returns on the others."""
        self._send(Kind.STEP, [number for step in steps for number in _numbers(step)])
        frames = [frame for step in steps for frame in step.frames]
        if frames:
            dist.broadcast(torch.stack(frames).to(self.device, self.dtype), src=0)
        for step in steps:
            if step.allowed is not None:
                dist.broadcast(step.allowed.contiguous(), src=0, group=self.group)

    def receive_steps(self, numbers: Sequence[int]) -> list[Step]:
        """The steps of a message, of this rank's slots, with their pending tokens."""
        steps, words, counts, at = list[Step](), list[int](), list[int](), 0
        while at < len(numbers):
            index, pending, sample, whole, likely, mask, frames, count = numbers[at : at + STEP]
            slot = self.slots[index]
            slot.pending = None if pending == NONE else pending
            tokens = list(numbers[at + STEP : at + STEP + count])
            most = None if likely == NONE else likely
            step = Step(slot, tokens, sample=bool(sample), likely=most, attend_all=bool(whole))
            steps.append(step)
            words.append(mask)
            counts.append(frames)
            at += STEP + count
        if any(counts):
            features = torch.empty(sum(counts), *self.frame, dtype=self.dtype, device=self.device)
            dist.broadcast(features, src=0)
            for step, part in zip(steps, features.split(counts), strict=True):
                step.frames = list(part)
        for step, mask in zip(steps, words, strict=True):
            if mask:
                step.allowed = torch.empty(mask, dtype=torch.int32)
                dist.broadcast(step.allowed, src=0, group=self.group)
        return steps

    def send_pixels(self, pixels: Tensor) -> None:
        """Sends, on rank 0, what `receive_pixels` returns on the others."""
        self._send(Kind.ENCODE, [len(pixels)])
        dist.broadcast(pixels.to(self.dtype).contiguous(), src=0)

    def receive_pixels(self, numbers: Sequence[int]) -> Tensor:
        """Normalized pictures `[n, 1, 3, h, w]`."""
        shape = numbers[0], *self.picture
        pixels = torch.empty(shape, dtype=self.dtype, device=self.device)
        dist.broadcast(pixels, src=0)
        return pixels

    def send_call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        """Sends, on rank 0, what `receive_call` returns on the others. A slot travels as its index
        and its pending token; a tensor on the engine's device travels from there."""
        file = io.BytesIO()
        pickler = _Pickler(file, self.device)
        pickler.dump((function, arguments))
        data = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
        self._send(Kind.CALL, [len(data)])
        dist.broadcast(data, src=0, group=self.group)
        for tensor in pickler.tensors:
            dist.broadcast(tensor, src=0)

    def receive_call(self, numbers: Sequence[int]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """A function and its arguments."""
        data = torch.empty(numbers[0], dtype=torch.uint8)
        dist.broadcast(data, src=0, group=self.group)
        file = io.BytesIO(data.numpy().tobytes())
        return _Unpickler(file, self.slots, self.device).load()

    def _send(self, kind: Kind, numbers: Sequence[int]) -> None:
        message = [kind, len(numbers), *numbers]
        first = message[:WORDS] + [0] * (WORDS - len(message))
        dist.broadcast(torch.tensor(first), src=0, group=self.group)
        if len(message) > WORDS:
            dist.broadcast(torch.tensor(message[WORDS:]), src=0, group=self.group)

    def receive(self) -> tuple[Kind, list[int]]:
        """Receives, on other ranks, the kind of rank 0's next message and its numbers; the
        `receive_...` of that kind must follow."""
        message = torch.empty(WORDS, dtype=torch.long)
        dist.broadcast(message, src=0, group=self.group)
        kind, count, *numbers = message.tolist()
        more = count + HEAD - WORDS
        if more > 0:
            rest = torch.empty(more, dtype=torch.long)
            dist.broadcast(rest, src=0, group=self.group)
            numbers += rest.tolist()
        return Kind(kind), numbers[:count]


def _numbers(step: Step) -> list[int]:
    pending = NONE if step.slot.pending is None else step.slot.pending
    likely = NONE if step.likely is None else step.likely
    words = 0 if step.allowed is None else len(step.allowed)
    head = [step.slot.index, pending, int(step.sample), int(step.attend_all), likely, words]
    return [*head, len(step.frames), len(step.tokens), *step.tokens]


class _Pickler(pickle.Pickler):
    """Collects the tensors that are on `device`, in the order in which they are to be broadcast."""

    def __init__(self, file: io.BytesIO, device: torch.device) -> None:
        super().__init__(file)
        self._device = device
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, Slot):
            return "slot", value.index, value.pending
        if isinstance(value, Tensor) and value.device == self._device:
            self.tensors.append(value.contiguous())
            return "tensor", tuple(value.shape), value.dtype
        return None


class _Unpickler(pickle.Unpickler):
    """Receives each tensor when the message names it, and finds this rank's slots."""

    def __init__(self, file: io.BytesIO, slots: Mapping[int, Slot], device: torch.device) -> None:
        super().__init__(file)
        self._slots, self._device = slots, device

    def persistent_load(self, reference: Any) -> Any:
        kind, first, second = reference
        if kind == "slot":
            slot = self._slots[first]
            slot.pending = second
            return slot
        tensor = torch.empty(first, dtype=second, device=self._device)
        dist.broadcast(tensor, src=0)
        return tensor
