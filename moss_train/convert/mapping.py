"""One table of parameter names and shapes, for both directions: HF Mllama <-> ours.

Names on the HF side are those on disk (`language_model.model.*`, `vision_model.*`). Each rule says
which HF tensors make up one of our parameters and how; the tensor-parallel slice follows from it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from moss_train.config import ModelConfig

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


def _mlp(prefix: str, ours: str) -> list[Rule]:
    gate_up = (f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight")
    return [
        Rule(f"{ours}mlp.linear_fc1.weight", gate_up, "gated", 0),
        Rule(f"{ours}mlp.linear_fc2.weight", (f"{prefix}mlp.down_proj.weight",), split=1),
    ]


def _projections(prefix: str, letters: str) -> tuple[str, ...]:
    return tuple(f"{prefix}{letter}_proj.weight" for letter in letters)


def _self_attention_rules() -> list[Rule]:
    hf, ours = TEXT_LAYER, "decoder.layers.{i}."
    attention = f"{ours}attention."
    return [
        Rule(f"{ours}input_norm.weight", (f"{hf}input_layernorm.weight",)),
        Rule(f"{attention}linear_qkv.weight", _projections(f"{hf}self_attn.", "qkv"), "heads", 0),
        Rule(f"{attention}linear_proj.weight", (f"{hf}self_attn.o_proj.weight",), split=1),
        Rule(f"{ours}mlp_norm.weight", (f"{hf}post_attention_layernorm.weight",)),
        *_mlp(hf, ours),
    ]


def _cross_attention_rules() -> list[Rule]:
    hf, ours = TEXT_LAYER, "decoder.layers.{i}."
    cross = f"{hf}cross_attn."
    return [
        Rule(f"{ours}input_norm.weight", (f"{hf}input_layernorm.weight",)),
        Rule(f"{ours}linear_q.weight", (f"{cross}q_proj.weight",), split=0),
        Rule(f"{ours}linear_kv.weight", _projections(cross, "kv"), "heads", 0),
        Rule(f"{ours}q_norm.weight", (f"{cross}q_norm.weight",)),
        Rule(f"{ours}k_norm.weight", (f"{cross}k_norm.weight",)),
        Rule(f"{ours}linear_proj.weight", (f"{cross}o_proj.weight",), split=1),
        Rule(f"{ours}attn_gate", (f"{hf}cross_attn_attn_gate",)),
        Rule(f"{ours}mlp_gate", (f"{hf}cross_attn_mlp_gate",)),
        Rule(f"{ours}mlp_norm.weight", (f"{hf}post_attention_layernorm.weight",)),
        *_mlp(hf, ours),
    ]


def _vision_layer_rules(hf: str, ours: str, gated: bool) -> list[Rule]:
    rules = [
        Rule(
            f"{ours}attention.linear_qkv.weight", _projections(f"{hf}self_attn.", "qkv"), "heads", 0
        ),
        Rule(f"{ours}attention.linear_proj.weight", (f"{hf}self_attn.o_proj.weight",), split=1),
        Rule(f"{ours}mlp.linear_fc1.weight", (f"{hf}mlp.fc1.weight",), split=0),
        Rule(f"{ours}mlp.linear_fc1.bias", (f"{hf}mlp.fc1.bias",), split=0),
        Rule(f"{ours}mlp.linear_fc2.weight", (f"{hf}mlp.fc2.weight",), split=1),
        Rule(f"{ours}mlp.linear_fc2.bias", (f"{hf}mlp.fc2.bias",)),
    ]
    for norm, name in (("input_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")):
        for kind in ("weight", "bias"):
            rules.append(Rule(f"{ours}{norm}.{kind}", (f"{hf}{name}.{kind}",)))
    if gated:
        rules += [Rule(f"{ours}{gate}", (f"{hf}{gate}",)) for gate in ("gate_attn", "gate_ffn")]
    return rules


def _single_rules(model: ModelConfig) -> list[Rule]:
    vision = "vision_model."
    pairs = {
        "vision.patch_embedding.weight": f"{vision}patch_embedding.weight",
        "vision.class_embedding": f"{vision}class_embedding",
        "vision.position.gate": f"{vision}gated_positional_embedding.gate",
        "vision.position.embedding": f"{vision}gated_positional_embedding.embedding",
        "vision.position.tile_embedding.weight": (
            f"{vision}gated_positional_embedding.tile_embedding.weight"
        ),
        "projector.linear.weight": "multi_modal_projector.weight",
        "projector.linear.bias": "multi_modal_projector.bias",
        "decoder.final_norm.weight": f"{TEXT}norm.weight",
    }
    for place in ("pre", "post"):
        tile = f"{vision}{place}_tile_positional_embedding."
        pairs[f"vision.{place}_tile.embedding.weight"] = f"{tile}embedding.weight"
        pairs[f"vision.{place}_tile.gate"] = f"{tile}gate"
        for kind in ("weight", "bias"):
            pairs[f"vision.norm_{place}.{kind}"] = f"{vision}layernorm_{place}.{kind}"
    if model.projector.pool == "channel_fusion":
        pairs["projector.merge.weight"] = "patch_merger.weight"
    return [
        *(Rule(ours, (hf,)) for ours, hf in pairs.items()),
        Rule("decoder.embedding.weight", (f"{TEXT}embed_tokens.weight",), split=0),
        Rule("decoder.output.weight", ("language_model.lm_head.weight",), split=0),
    ]


def table(model: ModelConfig) -> list[Rule]:
    """Every parameter of `model`, by global layer index."""
    rules = _single_rules(model)
    for index in range(model.text.num_layers):
        cross = index in model.text.cross_attention_layers
        rules += _numbered(_cross_attention_rules() if cross else _self_attention_rules(), index)
    for kind, hf, count in (
        ("local_layers", "transformer", model.vision.num_layers),
        ("global_layers", "global_transformer", model.vision.num_global_layers),
    ):
        template = _vision_layer_rules(
            f"vision_model.{hf}.layers.{{i}}.",
            f"vision.{kind}.{{i}}.",
            gated=kind == "global_layers",
        )
        for index in range(count):
            rules += _numbered(template, index)
    return rules


def rules(model: ModelConfig) -> dict[str, Rule]:
    """The rule of every parameter that `model` can have, by our name: its own and adapters'."""
    own = table(model)
    pairs = [pair for rule in own if adaptable(rule) for pair in _adapter_rules(rule)]
    return {rule.ours: rule for rule in (*own, *pairs)}


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


def _numbered(rules: list[Rule], index: int) -> Iterator[Rule]:
    for rule in rules:
        names = tuple(name.replace("{i}", str(index)) for name in rule.hf)
        yield Rule(rule.ours.replace("{i}", str(index)), names, rule.kind, rule.split)


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
    if rule.split is None:
        return {rule.hf[0]: slices[0]}
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
    name = re.sub(r"^model\.(vision_model|multi_modal_projector)\.", r"\1.", name)
    return re.sub(r"^lm_head\.", "language_model.lm_head.", name)


Reader = Callable[[str], Tensor]
