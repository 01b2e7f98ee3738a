"""Which parameters train, at which rate and decay: patterns of names, checked against the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase

import torch
import torch.distributed as dist
from torch import nn

from moss_train import hardware
from moss_train.config import Config, ConfigError, StageConfig
from moss_train.model.lora import PARAMETERS, is_adapter
from moss_train.model.moss_video import MossVideo

PARTS = ("vision", "projector", "decoder")
NO_DECAY = ("*norm*", "*gate*", "*.bias")
EMBEDDINGS = ("*class_embedding", "*position.embedding", "*embedding.weight")
# A convolution, in spite of its name.
NOT_EMBEDDINGS = ("*patch_embedding.*",)


@dataclass(frozen=True)
class Counts:
    """Parameters of the whole model, each counted once whatever the layout.

    trained, total: by first part of their name. patterns: trained by each pattern (a parameter
    that two patterns match counts for both).
    """

    trained: dict[str, int]
    total: dict[str, int]
    patterns: dict[str, int]

    def lines(self) -> Iterator[str]:
        """Lines for the log."""
        for pattern, count in self.patterns.items():
            yield f"trains {pattern}: {count:,} parameters"
        parts = (f"{part} {self.trained[part]:,} of {self.total[part]:,}" for part in PARTS)
        yield f"trains {', '.join(parts)} parameters"


def freeze(model: MossVideo, patterns: list[str], also: Sequence[str] = ()) -> Counts:
    """Leaves trainable only the parameters whose names match one of `patterns` (fnmatch), those of
    `stage.train`, or of `also`, those of `stage.also`.

    Of an adapted decoder the adapters train, whatever the patterns are, and nothing else.
    A collective. Raises ConfigError where a pattern matches no parameter.
    """
    if model.adapted:
        patterns = [*patterns, PARAMETERS]
    hits = match(model, "stage.train", patterns)
    more = match(model, "stage.also", [*also])
    hits = {name: own + more[name] for name, own in hits.items()}
    for name, parameter in model.named_parameters():
        beside = model.adapted and name.startswith("decoder.") and not is_adapter(name)
        parameter.requires_grad_(bool(hits[name]) and not beside)
    return _count(model, [*patterns, *also], hits)


def match(model: MossVideo, field: str, patterns: list[str]) -> dict[str, list[str]]:
    """The patterns that match each parameter of this rank, by name. A collective.

    Raises:
        ConfigError: a pattern of `field` matches no parameter of any rank.
    """
    names = [name for name, _ in model.named_parameters()]
    hits = {name: [p for p in patterns if fnmatchcase(name, p)] for name in names}
    everywhere: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(everywhere, {p for own in hits.values() for p in own})
    matched = set().union(*everywhere)
    unused = [pattern for pattern in patterns if pattern not in matched]
    if unused:
        raise ConfigError([f"{field}={unused}: matches no parameter of the model"])
    return hits


def check_gradients(model: MossVideo, counts: Counts, stage: StageConfig) -> None:
    """Refuses a stage in which a part trains that gets no gradient: vision and projector reach the
    loss only through the gates of the cross-attention, and of samples with frames. A collective.

    Raises:
        ConfigError: every `attn_gate` is 0 and none of them trains; or nothing else trains, and all
            samples are text.
    """
    if not counts.trained["decoder"] and stage.mixture.shares.keys() == {"text"}:
        trains = [*stage.train, *stage.also]
        raise ConfigError(
            [
                f"stage.mixture={asdict(stage.mixture)}: all samples are text, and what trains "
                f"({', '.join(trains)}) is reached by frames alone: nothing would be learned: give "
                "image or video a share, or train the decoder, too"
            ]
        )
    gates = [p for name, p in model.named_parameters() if name.endswith("attn_gate")]
    opened = any(bool(gate.requires_grad) or bool(gate.detach().any()) for gate in gates)
    anywhere = torch.tensor(float(opened), device=hardware.device())
    dist.all_reduce(anywhere, dist.ReduceOp.MAX)
    trained = [part for part in ("vision", "projector") if counts.trained[part]]
    if trained and not anywhere:
        raise ConfigError(
            [
                f"stage {stage.name}: {' and '.join(trained)} would get no gradient: every gate "
                "of the cross-attention is 0, and none of them trains: train them too, "
                "'stage.also=[decoder.*attn_gate]'"
            ]
        )


def _count(model: MossVideo, patterns: list[str], hits: dict[str, list[str]]) -> Counts:
    groups = model.groups
    keys = [("trained", part) for part in PARTS] + [("total", part) for part in PARTS]
    keys += [("patterns", pattern) for pattern in patterns]
    place = {key: index for index, key in enumerate(keys)}
    # The decoder is spread over a replica; the encoder at most over the tensor ranks.
    halves = torch.zeros(2, len(keys), dtype=torch.int64)
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        tensor = groups.decoder.tp if part == "decoder" else groups.vision.tp
        if tensor.rank() > 0 and not getattr(parameter, "tensor_model_parallel", False):
            continue  # counted elsewhere
        counted: list[tuple[str, str]] = [("total", part)]
        if parameter.requires_grad:
            counted += [("trained", part), *(("patterns", hit) for hit in set(hits[name]))]
        for key in counted:
            halves[int(part == "decoder"), place[key]] += parameter.numel()
    halves = halves.to(hardware.device())
    for half, group in zip(halves, (groups.vision.tp, groups.replica), strict=True):
        dist.all_reduce(half, group=group)
    sums = halves.sum(0).tolist()
    tables: dict[str, dict[str, int]] = {"trained": {}, "total": {}, "patterns": {}}
    for (kind, name), value in zip(keys, sums, strict=True):
        tables[kind][name] = value
    return Counts(**tables)


def group_overrides(model: MossVideo, config: Config) -> dict[nn.Parameter, dict[str, float]]:
    """What differs from the optimizer's defaults, by parameter. A collective.

    Norms, gates and biases do not decay, nor do embeddings with `optimizer.decay_embeddings=false`.
    Of several `optimizer.lr_multipliers` that match a parameter the last one counts.

    Raises:
        ConfigError: a pattern of `optimizer.lr_multipliers` matches no parameter.
    """
    options = config.optimizer
    factors = options.multipliers
    hits = match(model, "optimizer.lr_multipliers", list(factors))
    overrides = {}
    for name, parameter in model.named_parameters():
        changes: dict[str, float] = {}
        if not _decays(name, options.decay_embeddings):
            changes["wd_mult"] = 0.0
        factor = factors[hits[name][-1]] if hits[name] else 1.0
        if factor != 1.0:
            peak = config.lr * factor
            # megatron's schedule reads the rates; its checkpoints tell groups by the multiplier.
            changes |= {
                "max_lr": peak,
                "min_lr": peak * options.min_lr_ratio,
                "lr_mult": factor,
            }
        overrides[parameter] = changes
    return overrides


def _decays(name: str, embeddings: bool) -> bool:
    def among(patterns: tuple[str, ...]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    if among(NO_DECAY):
        return False
    return embeddings or not among(EMBEDDINGS) or among(NOT_EMBEDDINGS)
