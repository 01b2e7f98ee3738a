"""Fills a model with weights and reads them back, through HF names: random, loaded, exported."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moss_train.convert.random_init import Reader
from moss_train.model.hf_mapping import Rule, hf_shapes, kv_heads, rules, to_hf, to_ours
from moss_train.model.lora import is_adapter, low_rank_updates
from moss_train.model.moss_video import MossVideo
from moss_train.model_config import ModelConfig


def fill(model: MossVideo, read: Reader, adapters_only: bool = False) -> None:
    """Sets every parameter of this rank, or of its adapters alone, from `read(hf name, shape)`.

    Raises:
        ValueError: a tensor has another shape than the model needs; names it, and both shapes.
    """
    with torch.no_grad():
        for rule, parameter, group in _parameters(model):
            if adapters_only and not is_adapter(rule.ours):
                continue
            size, rank = group.size(), group.rank()
            tensors = []
            for name, shape in _hf_shapes(model.config, rule, parameter, size).items():
                tensor = read(name, shape)
                if tensor.shape != shape:
                    raise ValueError(
                        f"{name} has shape {list(tensor.shape)}, the model needs {list(shape)}"
                    )
                tensors.append(tensor)
            parameter.copy_(to_ours(model.config, rule, tensors, rank, size))


def export(
    model: MossVideo, value: Callable[[nn.Parameter], Tensor] | None = None
) -> dict[str, Tensor]:
    """HF tensors of the weights on this pipeline stage, whole, on every tensor rank.

    Adapters are merged into the weights. A collective: all ranks of a tensor group call it
    together.

    Args:
        value: what of each parameter is wanted instead of its weights, e.g. its gradient; then
            adapters are parameters of their own.
    """
    out: dict[str, Tensor] = {}
    updates = low_rank_updates(model.layers) if value is None else {}
    for rule, parameter, group in _parameters(model):
        if value is not None:
            part = value(parameter).contiguous()
        elif is_adapter(rule.ours):
            continue
        else:
            part = parameter.detach().contiguous()
            if rule.ours in updates:  # rounded once
                part = (part.float() + updates[rule.ours]).to(part.dtype)
        slices = [part]
        if rule.split is not None and group.size() > 1:
            slices = [torch.empty_like(part) for _ in range(group.size())]
            dist.all_gather(slices, part, group=group)
        out.update(to_hf(model.config, rule, slices))
    return out


def _parameters(model: MossVideo) -> Iterator[tuple[Rule, nn.Parameter, dist.ProcessGroup]]:
    by_name = rules(model.config)
    for name, parameter in model.named_parameters():
        in_decoder = name.startswith("decoder.")
        groups = model.groups.decoder if in_decoder else model.groups.vision
        yield by_name[name], parameter, groups.tp


def _hf_shapes(
    model: ModelConfig, rule: Rule, parameter: nn.Parameter, size: int
) -> dict[str, torch.Size]:
    if not is_adapter(rule.ours):
        return hf_shapes(model, rule)
    shape = list(parameter.shape)
    if rule.split is not None:
        shape[rule.split] *= size
    if rule.kind == "copy":
        return {rule.hf[0]: torch.Size(shape)}
    if rule.kind == "gated":
        return {name: torch.Size([shape[0] // 2, *shape[1:]]) for name in rule.hf}
    shared = kv_heads(model, rule) * model.text.head_dim  # only the decoder has adapters
    rows = [shape[0] - shared * (len(rule.hf) - 1)] + [shared] * (len(rule.hf) - 1)
    return {n: torch.Size([r, *shape[1:]]) for n, r in zip(rule.hf, rows, strict=True)}
