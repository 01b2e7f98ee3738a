"""Names of tensors as other tools write them: prefixes of wrappers, buffers, adapters' parts."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

# What torch.compile, FSDP and activation checkpointing put inside of names.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# The embedding's names, longest first: what stands before one of them is a prefix.
EMBEDDINGS = (
    "language_model.model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "model.embed_tokens.weight",
)
# Numbers that follow from config.json, which older tools saved beside the weights.
BUFFERS = re.compile(
    r".*(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|position_ids"
    r"|(^|\.)rope\.freqs|self_attn\.(masked_bias|bias))"
)
ADAPTED = re.compile(
    r".*(\.base_layer\.|lora_[AB]\b|lora_embedding_|lora_magnitude_vector|modules_to_save\.|\.ia3_l"
    r"|prompt_embeddings|hada_w|lokr_)"
)


def is_buffer(name: str) -> bool:
    """True for what is no weight, and follows from config.json."""
    return BUFFERS.fullmatch(name) is not None


def adapter_part(names: Collection[str]) -> str | None:
    """The first name of a tensor that belongs to an adapter."""
    return next((name for name in sorted(names) if ADAPTED.match(name)), None)


def unwrapped(name: str) -> str:
    """A parameter's name without the parts that wrappers put into it."""
    return WRAPPERS.sub("", name)


def common_prefix(names: Collection[str], embeddings: Sequence[str] = EMBEDDINGS) -> str:
    """What stands before the known name of the embedding, and before every other name, or ""."""
    for embedding in embeddings:
        for name in names:
            prefix = name.removesuffix(embedding)
            if name.endswith(f".{embedding}") and all(other.startswith(prefix) for other in names):
                return prefix
    return ""


def shortened(lines: Sequence[str], most: int = 20) -> list[str]:
    """The first of them, and how many more there are."""
    if len(lines) <= most + 1:
        return list(lines)
    return [*lines[:most], f"and {len(lines) - most} more"]
