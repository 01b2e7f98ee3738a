"""Tensor parallelism: the engine in several processes, started by torchrun.

Each rank holds a slice of the heads and of the MLP of every layer, of the decoder and of the
vision tower; partial results are summed where they join the residual stream. Rank 0 is the engine
that the program sees: it tells the others each call before it makes it. Calls that would fail are
refused before they are told, so all ranks stay in step; a rank that fails ends all (torchrun).
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inference.engine.engine import Engine, Step
from inference.engine.sampling import Sampling
from inference.engine.slots import Slot
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration

IDLE = timedelta(days=3650)  # followers wait for the next call as long as it takes


class RowLinear(nn.Module):
    """A slice of the input's columns; the sum over ranks is the whole product."""

    def __init__(self, whole: nn.Linear, rank: int, size: int):
        super().__init__()
        self.linear = _linear(whole.weight.chunk(size, 1)[rank])
        self.bias = whole.bias

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        dist.all_reduce(out)
        return out if self.bias is None else out + self.bias


class GatheredLinear(nn.Module):
    """A slice of the output's rows; all ranks get all of them."""

    def __init__(self, whole: nn.Linear, rank: int, size: int):
        super().__init__()
        self.size = size
        self.linear = _linear(whole.weight.chunk(size, 0)[rank])

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        parts = [torch.empty_like(out) for _ in range(self.size)]
        dist.all_gather(parts, out.contiguous())
        return torch.cat(parts, dim=-1)


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    made = nn.Linear(1, 1, bias=bias is not None, device="meta")
    made.out_features, made.in_features = weight.shape
    made.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return made


def shard(model: MossVideoForConditionalGeneration, rank: int, size: int) -> None:
    """Cuts a model to this rank's slice, in place.

    Raises:
        ValueError: names a size of the config that `size` ranks cannot share.
    """
    check_divisible(model.config, size)
    for module in model.modules():
        for name, child in list(module.named_children()):
            if not isinstance(child, nn.Linear):
                continue
            if name in ("o_proj", "down_proj", "fc2"):
                setattr(module, name, RowLinear(child, rank, size))
            elif name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1"):
                bias = None if child.bias is None else child.bias.chunk(size)[rank]
                setattr(module, name, _linear(child.weight.chunk(size, 0)[rank], bias))
    head = model.lm_head
    assert isinstance(head, nn.Linear)
    model.lm_head = GatheredLinear(head, rank, size)


def check_divisible(config: Any, size: int) -> None:
    """What is shared among ranks must be a multiple of their number."""
    text, vision = config.text_config, config.vision_config
    for section, name in (
        (text, "num_attention_heads"),
        (text, "num_key_value_heads"),
        (text, "intermediate_size"),
        (text, "vocab_size"),
        (vision, "attention_heads"),
        (vision, "intermediate_size"),
    ):
        value = getattr(section, name)
        if value % size:
            where = "text_config" if section is text else "vision_config"
            raise ValueError(
                f"{size} ranks cannot share {where}.{name}={value}: start a number of processes "
                "that divides it"
            )


def join() -> tuple[int, int]:
    """This process's rank and how many there are, as torchrun says; the process group is made."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return int(os.environ.get("RANK", "0")), size


def leave() -> None:
    """Ends this process's part in the groups: their threads, left running, may abort its exit."""
    dist.destroy_process_group()


class ShardedEngine(Engine):
    """An engine whose model is a slice: rank 0 leads, others `follow`."""

    def __init__(self, model: MossVideoForConditionalGeneration, processor: Any, **options: Any):
        super().__init__(model, processor, **options)
        self.leads = dist.get_rank() == 0
        self.ranks = dist.get_world_size()
        self.control = dist.new_group(backend="gloo", timeout=IDLE)
        self.running = True
        if self.leads:
            atexit.register(self.shutdown)

    def shutdown(self) -> None:
        """Ends the other ranks."""
        if self.leads and self.running:
            self.running = False
            self._tell("stop")
            leave()

    def follow(self) -> None:
        """What other ranks do: the calls of rank 0, until it shuts down."""
        while True:
            message: list[Any] = [None]
            dist.broadcast_object_list(message, src=0, group=self.control)
            name, arguments = message[0]
            if name == "stop":
                return leave()
            getattr(self, f"_follow_{name}")(*arguments)

    def open(self, sampling: Sampling | None = None) -> Slot:
        self.check_free()
        self._tell("open", sampling)
        return super().open(sampling)

    def set_sampling(self, slot: Slot, sampling: Sampling) -> None:
        self._tell("set_sampling", slot.index, sampling)
        super().set_sampling(slot, sampling)

    def close(self, slot: Slot) -> None:
        if not slot.closed:
            self._tell("close", slot.index)
            super().close(slot)

    def encode_pixels(self, pixels: Tensor) -> list[Tensor]:
        self._tell("encode", tuple(pixels.shape))
        dist.broadcast(pixels, src=0)
        return super().encode_pixels(pixels)

    def step(self, steps: Sequence[Step]) -> list[int | None]:
        self.check(steps)
        told = [(s.slot.index, s.slot.pending, list(s.tokens), s.sample) for s in steps]
        frames = [frame for step in steps for frame in step.frames]
        self._tell("step", told, len(frames))
        if frames:
            dist.broadcast(torch.stack(frames), src=0)
        return super().step(steps)

    def save(self, slot: Slot) -> dict[str, Any]:
        """The whole session, as one process would save it."""
        self._tell("save", slot.index)
        return self._gather(slot)

    def restore(self, state: dict[str, Any]) -> Slot:
        self.check_state(state)
        self.check_free()
        self._tell("restore", state)
        return super().restore(self._own(state))

    def check_state(self, state: dict[str, Any]) -> None:
        super().check_state(state if state["text"].shape[2] == self._heads else self._own(state))

    def _tell(self, name: str, *arguments: Any) -> None:
        dist.broadcast_object_list([(name, arguments)], src=0, group=self.control)

    def _follow_open(self, sampling: Sampling | None) -> None:
        Engine.open(self, sampling)

    def _follow_set_sampling(self, index: int, sampling: Sampling) -> None:
        Engine.set_sampling(self, self.slots[index], sampling)

    def _follow_close(self, index: int) -> None:
        Engine.close(self, self.slots[index])

    def _follow_encode(self, shape: tuple[int, ...]) -> None:
        pixels = torch.empty(shape, device=self.device)
        dist.broadcast(pixels, src=0)
        Engine.encode_pixels(self, pixels)

    def _follow_step(self, told: list[tuple[int, int | None, list[int], bool]], count: int) -> None:
        frames: list[Tensor] = []
        if count:
            shape = (count, self.cache.patches, self.config.text_config.hidden_size)
            stacked = torch.empty(shape, device=self.device, dtype=self.dtype)
            dist.broadcast(stacked, src=0)
            frames = list(stacked.unbind())
        steps = []
        for index, pending, tokens, sample in told:
            slot = self.slots[index]
            slot.pending = pending
            images = tokens.count(self.image_token)
            steps.append(Step(slot, tokens, frames[:images], sample))
            frames = frames[images:]
        Engine.step(self, steps)
        for step in steps:
            step.slot.evictions.clear()  # rank 0 reports them

    def _follow_save(self, index: int) -> None:
        self._gather(self.slots[index])

    def _follow_restore(self, state: dict[str, Any]) -> None:
        Engine.restore(self, self._own(state))

    def _gather(self, slot: Slot) -> dict[str, Any]:
        own = Engine.save(self, slot)
        parts: list[Any] | None = [None] * self.ranks if self.leads else None
        dist.gather_object((own["text"], own["frames"]), parts, dst=0, group=self.control)
        if parts is not None:
            # [layers, 2, KV heads, L, D]
            own["text"] = torch.cat([text for text, _ in parts], dim=2)
            own["frames"] = torch.cat([frames for _, frames in parts], dim=2)
        return own

    @property
    def _heads(self) -> int:
        return self.cache.text.shape[3]

    def _own(self, state: dict[str, Any]) -> dict[str, Any]:
        """This rank's KV heads of a saved session."""
        start = dist.get_rank() * self._heads
        cut = {name: state[name].narrow(2, start, self._heads) for name in ("text", "frames")}
        return {**state, **cut}
