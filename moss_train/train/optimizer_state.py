"""The optimizer's state in a checkpoint: every rank writes and reads what it holds, in any layout.

megatron's distributed optimizer gives each data-parallel rank a range of every flattened parameter.
Its portable checkpoint form (`fully_reshardable`) gathers all ranges on every rank before it writes
a byte: 12 bytes a parameter on the host, minutes for a large model; its parallel form
(`dp_reshardable`) can be read only with the same tensor and pipeline sizes. A range of a flattened
tensor, however, is a few boxes of the tensor itself, and boxes of any size are what distributed
checkpoints are made of. So each rank writes its boxes, under the names of `fully_reshardable`:
nothing is gathered, and what one layout wrote, every other one reads, megatron's own reader too.

There is no public way to a parameter's range and state: `_local_states` asks megatron-core's
DistributedOptimizer (0.16 and 0.19) for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

FORM = "fully_reshardable"  # megatron's name of what the files hold
Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes


def sharded_state(
    optimizer: ChainedOptimizer, model: dict[str, Any], loading: bool
) -> dict[Any, Any]:
    """The state in megatron's form for `dist_checkpointing.save` and `.load`.

    Args:
        model: the sharded state of the model's parameters, by name.
        loading: the tensors of the result are then filled in place by `.load`.
    """
    sharded = {value.data: value for value in model.values() if hasattr(value, "replica_id")}
    parts = [_part_state(part, sharded, loading) for part in optimizer.chained_optimizers]
    return parts[0] if len(parts) == 1 else dict(enumerate(parts))


def load_rest(optimizer: ChainedOptimizer, state: dict[Any, Any]) -> None:
    """Takes the step from a loaded state, whose tensors are in place. Rates, betas, eps and decay
    are those of this run: what is changed in its configuration takes effect."""
    parts = optimizer.chained_optimizers
    for number, part in enumerate(parts):
        saved = state if len(parts) == 1 else state[number]
        del saved["param_state"], saved["param_state_sharding_type"]
        step = max(group.get("step", 0) for group in saved["optimizer"]["param_groups"])
        groups = part.state_dict()["optimizer"]["param_groups"]
        saved["optimizer"]["param_groups"] = [{**group, "step": step} for group in groups]
    optimizer.load_state_dict(state)


def boxes(shape: tuple[int, ...], start: int, end: int) -> Iterator[Box]:
    """The boxes that elements `start` to `end` (not included) of a flattened tensor make, in order.

    Args:
        shape: of the tensor. A range of a matrix is three boxes at most: the end of a row, whole
            rows, the beginning of a row.
    """
    if start >= end:
        return
    if not shape:
        yield (), ()
        return
    row, inner = prod(shape[1:]), shape[1:]
    first, last = start // row, (end - 1) // row
    if first == last:
        yield from _within(first, inner, start - first * row, end - first * row)
        return
    whole = -(-start // row), end // row
    if start % row:
        yield from _within(first, inner, start % row, row)
    if whole[0] < whole[1]:
        yield (whole[0], *(0 for _ in inner)), (whole[1] - whole[0], *inner)
    if end % row:
        yield from _within(last, inner, 0, end % row)


def _within(index: int, inner: tuple[int, ...], start: int, end: int) -> Iterator[Box]:
    for offsets, sizes in boxes(inner, start, end):
        yield (index, *offsets), (1, *sizes)


def _part_state(
    part: DistributedOptimizer, sharded: dict[Tensor, Any], loading: bool
) -> dict[str, Any]:
    rest = part.state_dict()
    if loading:
        part.load_state_dict(rest)  # makes the tensors that will be filled
    tensors = {
        number: {
            name: list(_pieces(sharded[parameter], name, start, flat))
            for name, flat in states.items()
        }
        for number, (parameter, start, states) in enumerate(_local_states(part))
    }
    return rest | {"param_state": tensors, "param_state_sharding_type": FORM}


def _local_states(
    part: DistributedOptimizer,
) -> Iterator[tuple[nn.Parameter, int, dict[str, Tensor]]]:
    """(parameter, start of this rank's range of it, the range's param, exp_avg, exp_avg_sq)."""
    for buffer in part.gbuf_ranges:
        for bucket in (bucket for buckets in buffer.values() for bucket in buckets):
            for parameter, ranges in bucket["param_map"].items():
                states = dict(part._get_main_param_and_optimizer_states(parameter))
                states.pop("step", None)  # it belongs to a group
                yield parameter, ranges["param"].start, states


def _pieces(
    sharded: ShardedTensor | ShardedTensorFactory, name: str, start: int, flat: Tensor
) -> Iterator[ShardedTensor]:
    """The boxes of a range: `flat` holds the elements from `start` of the rank's parameter."""
    whole = sharded.data
    for part in _tensors(sharded):
        assert part.data is not None
        assert part.data.is_contiguous()
        assert part.prepend_axis_num == 0
        begin = part.data.storage_offset() - whole.storage_offset()
        at = max(start, begin)
        until = min(start + flat.numel(), begin + part.data.numel())
        for offsets, sizes in boxes(tuple(part.local_shape), at - begin, until - begin):
            data = flat[at - start : at - start + prod(sizes)].detach().view(sizes)
            at += prod(sizes)
            shift = zip(part.global_offset, offsets, strict=True)
            yield ShardedTensor(
                key=f"optimizer.state.{name}.{part.key}",
                data=data,
                dtype=data.dtype,
                local_shape=sizes,
                global_shape=part.global_shape,
                global_offset=tuple(base + offset for base, offset in shift),
                axis_fragmentations=None,  # boxes of any size
                # Each data-parallel rank has boxes of its own.
                replica_id=(*part.replica_id[:2], 0),
                allow_shape_mismatch=part.allow_shape_mismatch,
            )


def _tensors(sharded: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """The tensors that a parameter is in a checkpoint: gate and up of SwiGLU are parts of one."""
    return [sharded] if isinstance(sharded, ShardedTensor) else list(sharded.build())
