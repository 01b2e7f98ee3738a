"""One table of parameter names and shapes, for both directions: HF Mllama <-> ours.

Names on the HF side are those on disk (`language_model.model.*`, `vision_model.*`). Each rule says
which HF tensors make up one of our parameters and how; the tensor-parallel slice follows from it.
Shapes are written in the words of `sizes`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from moss_train.model_config import ModelConfig

TEXT = "language_model.model."
TEXT_LAYER = TEXT + "layers.{i}."


@dataclass(frozen=True)
class Rule:
    """`ours` is made of `hf` (names with {i} for a layer's index) in the way of `kind`.

    kind: copy | heads (projections that share attention heads, interleaved by KV head, as megatron
    keeps them) | gated (gate and up projection, each sliced by itself).
    """

    ours: str
    hf: tuple[str, ...]
    kind: str = "copy"
    split: int | None = None  # dimension sliced over tensor ranks
    shapes: tuple[str, ...] = ()  # of each of `hf`, in words; () for adapters, whose rank is free


@dataclass(frozen=True)
class Pattern:
    """A rule, and the layers that it stands for; None: it has no {i}."""

    rule: Rule
    layers: tuple[int, ...] | None = None


def sizes(model: ModelConfig) -> dict[str, int]:
    """The sizes that the words in `Rule.shapes` stand for."""
    vision, text = model.vision, model.text
    rows = text.vocab_size + text.extra_embedding_rows
    width = vision.hidden_size
    return {
        "vocabulary": text.vocab_size,
        "embedded": rows,
        "hidden": text.hidden_size,
        "heads": text.num_heads * text.head_dim,
        "kv": text.num_kv_heads * text.head_dim,
        "head": text.head_dim,
        "mlp": text.mlp_size,
        "vision": width,
        "vision_mlp": vision.mlp_size,
        "patch": vision.patch_size,
        "patches": vision.num_patches,
        "ratios": vision.num_aspect_ratios + 1,
        "tiles": vision.max_tiles * width,
        "tile_patches": vision.max_tiles * vision.num_patches * width,
        "vision_out": vision.output_size,
        "stride": model.projector.stride,
    }


def hf_shapes(model: ModelConfig, rule: Rule) -> dict[str, torch.Size]:
    """Whole shapes of a rule's HF tensors (not of adapters')."""
    words = sizes(model)
    return {
        name: torch.Size(int(word) if word.isdigit() else words[word] for word in shape.split())
        for name, shape in zip(rule.hf, rule.shapes, strict=True)
    }


def our_shape(model: ModelConfig, rule: Rule) -> torch.Size:
    """Whole shape of a rule's parameter of ours (not of adapters')."""
    shapes = list(hf_shapes(model, rule).values())
    return torch.Size([sum(shape[0] for shape in shapes), *shapes[0][1:]])


def _projection(prefix: str, letters: str, rows: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names and shapes of projections `q_proj` .. whose inputs are as wide as `q`'s output."""
    names = tuple(f"{prefix}{letter}_proj.weight" for letter in letters)
    return names, tuple(rows.split(", "))


def _mlp(prefix: str, ours: str) -> list[Rule]:
    gate_up = (f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight")
    down = (f"{prefix}mlp.down_proj.weight",)
    return [
        Rule(f"{ours}mlp.linear_fc1.weight", gate_up, "gated", 0, ("mlp hidden", "mlp hidden")),
        Rule(f"{ours}mlp.linear_fc2.weight", down, split=1, shapes=("hidden mlp",)),
    ]


def _one(ours: str, hf: str, shape: str, split: int | None = None) -> Rule:
    return Rule(ours, (hf,), split=split, shapes=(shape,))


def _self_attention_rules() -> list[Rule]:
    hf, ours = TEXT_LAYER, "decoder.layers.{i}."
    attention = f"{ours}attention."
    names, shapes = _projection(f"{hf}self_attn.", "qkv", "heads hidden, kv hidden, kv hidden")
    return [
        _one(f"{ours}input_norm.weight", f"{hf}input_layernorm.weight", "hidden"),
        Rule(f"{attention}linear_qkv.weight", names, "heads", 0, shapes),
        _one(f"{attention}linear_proj.weight", f"{hf}self_attn.o_proj.weight", "hidden heads", 1),
        _one(f"{ours}mlp_norm.weight", f"{hf}post_attention_layernorm.weight", "hidden"),
        *_mlp(hf, ours),
    ]


def _cross_attention_rules() -> list[Rule]:
    hf, ours = TEXT_LAYER, "decoder.layers.{i}."
    cross = f"{hf}cross_attn."
    names, shapes = _projection(cross, "kv", "kv hidden, kv hidden")
    return [
        _one(f"{ours}input_norm.weight", f"{hf}input_layernorm.weight", "hidden"),
        _one(f"{ours}linear_q.weight", f"{cross}q_proj.weight", "heads hidden", 0),
        Rule(f"{ours}linear_kv.weight", names, "heads", 0, shapes),
        _one(f"{ours}q_norm.weight", f"{cross}q_norm.weight", "head"),
        _one(f"{ours}k_norm.weight", f"{cross}k_norm.weight", "head"),
        _one(f"{ours}linear_proj.weight", f"{cross}o_proj.weight", "hidden heads", 1),
        _one(f"{ours}attn_gate", f"{hf}cross_attn_attn_gate", "1"),
        _one(f"{ours}mlp_gate", f"{hf}cross_attn_mlp_gate", "1"),
        _one(f"{ours}mlp_norm.weight", f"{hf}post_attention_layernorm.weight", "hidden"),
        *_mlp(hf, ours),
    ]


def _vision_layer_rules(hf: str, ours: str, gated: bool) -> list[Rule]:
    square, mlp = "vision vision", "mlp.linear_fc"
    names, shapes = _projection(f"{hf}self_attn.", "qkv", f"{square}, {square}, {square}")
    rules = [
        Rule(f"{ours}attention.linear_qkv.weight", names, "heads", 0, shapes),
        _one(f"{ours}attention.linear_proj.weight", f"{hf}self_attn.o_proj.weight", square, 1),
        _one(f"{ours}{mlp}1.weight", f"{hf}mlp.fc1.weight", "vision_mlp vision", 0),
        _one(f"{ours}{mlp}1.bias", f"{hf}mlp.fc1.bias", "vision_mlp", 0),
        _one(f"{ours}{mlp}2.weight", f"{hf}mlp.fc2.weight", "vision vision_mlp", 1),
        _one(f"{ours}{mlp}2.bias", f"{hf}mlp.fc2.bias", "vision"),
    ]
    for norm, name in (("input_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")):
        for kind in ("weight", "bias"):
            rules.append(_one(f"{ours}{norm}.{kind}", f"{hf}{name}.{kind}", "vision"))
    if gated:
        rules += [_one(f"{ours}{gate}", f"{hf}{gate}", "1") for gate in ("gate_attn", "gate_ffn")]
    return rules


def _single_rules(model: ModelConfig) -> list[Rule]:
    hf, position = "vision_model.", "vision_model.gated_positional_embedding."
    rules = [
        _one(
            "vision.patch_embedding.weight", f"{hf}patch_embedding.weight", "vision 3 patch patch"
        ),
        _one("vision.class_embedding", f"{hf}class_embedding", "vision"),
        _one("vision.position.gate", f"{position}gate", "1"),
        _one("vision.position.embedding", f"{position}embedding", "patches vision"),
        _one(
            "vision.position.tile_embedding.weight",
            f"{position}tile_embedding.weight",
            "ratios tile_patches",
        ),
    ]
    for place in ("pre", "post"):
        tile = f"{hf}{place}_tile_positional_embedding."
        ours = f"vision.{place}_tile."
        rules.append(_one(f"{ours}embedding.weight", f"{tile}embedding.weight", "ratios tiles"))
        rules.append(_one(f"{ours}gate", f"{tile}gate", "1"))
        for kind in ("weight", "bias"):
            norm = f"layernorm_{place}.{kind}"
            rules.append(_one(f"vision.norm_{place}.{kind}", f"{hf}{norm}", "vision"))
    if model.projector.pool == "channel_fusion":
        merge = "vision_out vision_out stride stride"
        rules.append(_one("projector.merge.weight", "patch_merger.weight", merge))
    projector = "multi_modal_projector."
    head = "language_model.lm_head.weight"
    return [
        *rules,
        _one("projector.linear.weight", f"{projector}weight", "hidden vision_out"),
        _one("projector.linear.bias", f"{projector}bias", "hidden"),
        _one("decoder.embedding.weight", f"{TEXT}embed_tokens.weight", "embedded hidden", 0),
        _one("decoder.final_norm.weight", f"{TEXT}norm.weight", "hidden"),
        _one("decoder.output.weight", head, "vocabulary hidden", 0),
    ]


def patterns(model: ModelConfig) -> list[Pattern]:
    """Every parameter of `model`, a line for all layers of a kind."""
    cross = tuple(sorted(model.text.cross_attention_layers))
    own = tuple(i for i in range(model.text.num_layers) if i not in cross)
    every = [Pattern(rule) for rule in _single_rules(model)]
    for kind, hf, count in (
        ("local_layers", "transformer", model.vision.num_layers),
        ("global_layers", "global_transformer", model.vision.num_global_layers),
    ):
        hf, ours = f"vision_model.{hf}.layers.{{i}}.", f"vision.{kind}.{{i}}."
        layer = _vision_layer_rules(hf, ours, gated=kind == "global_layers")
        every += [Pattern(rule, tuple(range(count))) for rule in layer]
    every += [Pattern(rule, own) for rule in _self_attention_rules()]
    return every + [Pattern(rule, cross) for rule in _cross_attention_rules()]


def table(model: ModelConfig) -> list[Rule]:
    """Every parameter of `model`, by global layer index."""
    return [
        rule
        for pattern in patterns(model)
        for rule in ([pattern.rule] if pattern.layers is None else _numbered(pattern))
    ]


def rules(model: ModelConfig) -> dict[str, Rule]:
    """The rule of every parameter that `model` can have, by our name: its own and adapters'."""
    own = table(model)
    pairs = [pair for rule in own if adaptable(rule) for pair in _adapter_rules(rule)]
    return {rule.ours: rule for rule in (*own, *pairs)}


def parameters_of(model: ModelConfig, *parts: str) -> list[str]:
    """Our names of the parameters of these parts: vision, projector, decoder."""
    return [rule.ours for rule in table(model) if rule.ours.split(".")[0] in parts]


def adaptable(rule: Rule) -> bool:
    """True for the weight of a linear layer of the decoder's layers, which LoRA can adapt."""
    return re.fullmatch(r"decoder\.layers\..*linear_\w+\.weight", rule.ours) is not None


def unmatched_targets(model: ModelConfig, patterns: list[str]) -> list[str]:
    """Patterns (of `adapter.target`) that match no linear layer of the decoder."""
    layers = [rule.ours.removesuffix(".weight") for rule in table(model) if adaptable(rule)]
    return [p for p in patterns if not any(fnmatchcase(name, p) for name in layers)]


def _adapter_rules(rule: Rule) -> tuple[Rule, Rule]:
    """A and B of a linear layer: the side that the layer splits over tensor ranks is split."""
    ours = rule.ours.removesuffix("weight")
    hf = tuple(name.removesuffix("weight") for name in rule.hf)
    if rule.split == 1:
        return (
            Rule(f"{ours}lora_a", (f"{hf[0]}lora_a",), split=1),
            Rule(f"{ours}lora_b", (f"{hf[0]}lora_b",)),
        )
    # Fused projections share one A; B has the rows of each, in the weight's order.
    names = tuple(f"{name}lora_b" for name in hf)
    return (
        Rule(f"{ours}lora_a", (f"{hf[0]}lora_a",)),
        Rule(f"{ours}lora_b", names, rule.kind, rule.split),
    )


def _numbered(pattern: Pattern) -> Iterator[Rule]:
    for index in map(str, pattern.layers or ()):
        names = tuple(name.replace("{i}", index) for name in pattern.rule.hf)
        yield replace(pattern.rule, ours=pattern.rule.ours.replace("{i}", index), hf=names)


def kv_heads(model: ModelConfig, rule: Rule) -> int:
    """KV heads by which a `heads` rule interleaves."""
    return model.vision.num_heads if rule.ours.startswith("vision.") else model.text.num_kv_heads


def to_ours(model: ModelConfig, rule: Rule, tensors: list[Tensor], rank: int, size: int) -> Tensor:
    """This tensor rank's slice of our parameter, made of whole HF tensors in the rule's order."""
    if rule.kind == "heads":
        heads = kv_heads(model, rule)
        tensors = [torch.cat([t.unflatten(0, (heads, -1)) for t in tensors], 1).flatten(0, 1)]
    if rule.split is None:
        return tensors[0]
    return torch.cat([t.chunk(size, rule.split)[rank] for t in tensors], rule.split)


def to_hf(model: ModelConfig, rule: Rule, slices: list[Tensor]) -> dict[str, Tensor]:
    """Whole HF tensors of one of our parameters, from its slices in order of tensor rank."""
    if rule.split is None or (rule.kind == "copy" and len(slices) == 1):
        return {rule.hf[0]: slices[0]}
    if rule.kind == "gated" and len(slices) == 1:
        return dict(zip(rule.hf, slices[0].chunk(2, 0), strict=True))
    if rule.kind == "gated":
        halves = [s.chunk(2, 0) for s in slices]
        return {name: torch.cat([h[n] for h in halves], 0) for n, name in enumerate(rule.hf)}
    whole = torch.cat(slices, rule.split)
    if rule.kind == "copy":
        return {rule.hf[0]: whole}
    heads = kv_heads(model, rule)
    grouped = whole.unflatten(0, (heads, -1))  # [kv heads, rows of all projections, H]
    vision = rule.ours.startswith("vision.")
    head_dim = model.vision.hidden_size // heads if vision else model.text.head_dim
    shared = grouped.shape[1] - head_dim * (len(rule.hf) - 1)
    parts = grouped.split([shared] + [head_dim] * (len(rule.hf) - 1), 1)
    return {name: part.flatten(0, 1) for name, part in zip(rule.hf, parts, strict=True)}


def normalize_name(name: str) -> str:
    """The name on disk of a parameter of transformers 4.x or 5.x."""
    name = re.sub(r"^model\.language_model\.", TEXT, name)
    name = re.sub(r"^model\.(vision_model|multi_modal_projector|patch_merger)\.", r"\1.", name)
    return re.sub(r"^lm_head\.", "language_model.lm_head.", name)
