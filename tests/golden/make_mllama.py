"""Makes the golden numbers of plain Llama-3.2-Vision with transformers' own Mllama.

    python tests/golden/make_mllama.py

Writes mllama.json (the config) and mllama.safetensors (weights `model.*`, the batch, and what the
model makes of it) next to this file. Random weights, fp32, eager attention, CPU. The batch has what
is hard: images of one to four tiles with padding tiles, rows of unequal length and unequal count of
images (so a padding image), consecutive images, and tokens before the first image.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.image_processing_pil_mllama import (
    build_aspect_ratio_mask_np,
    convert_aspect_ratios_to_ids_np,
)
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

HERE = Path(__file__).resolve().parent
IMAGE, PAD, VOCAB = 64, 4, 64
GREEDY = 8
GRADIENTS = (
    "vision_model.patch_embedding.weight",
    "vision_model.class_embedding",
    "vision_model.gated_positional_embedding.gate",
    "vision_model.gated_positional_embedding.tile_embedding.weight",
    "vision_model.post_tile_positional_embedding.gate",
    "vision_model.transformer.layers.1.self_attn.k_proj.weight",
    "vision_model.global_transformer.layers.0.gate_attn",
    "multi_modal_projector.weight",
    "language_model.model.embed_tokens.weight",
    "language_model.model.layers.0.self_attn.v_proj.weight",
    "language_model.model.layers.1.cross_attn.k_proj.weight",
    "language_model.model.layers.1.cross_attn.k_norm.weight",
    "language_model.model.layers.1.cross_attn.q_norm.weight",
    "language_model.model.layers.1.cross_attn_attn_gate",
    "language_model.model.layers.1.cross_attn_mlp_gate",
    "language_model.model.layers.3.mlp.down_proj.weight",
    "language_model.lm_head.weight",
)
CONFIG: dict[str, Any] = {
    "model_type": "mllama",
    "image_token_index": IMAGE,
    "torch_dtype": "float32",
    "vision_config": {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_global_layers": 1,
        "attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 28,
        "patch_size": 14,
        "max_num_tiles": 4,
        "intermediate_layers_indices": [1, 2],
        "vision_output_dim": 48,
        "supported_aspect_ratios": [
            [1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1],
        ],
        "norm_eps": 1e-5,
        "hidden_act": "gelu",
    },
    "text_config": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "cross_attention_layers": [1, 2],
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "max_position_embeddings": 128,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 9,
        "pad_token_id": PAD,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A text of `length` tokens, with images of these tiles (wide, high) at these tokens."""

    length: int
    marks: list[int]
    ratios: list[tuple[int, int]]


ROWS = (
    Row(30, [4, 9, 10, 20], [(1, 1), (2, 2), (1, 3), (2, 1)]),
    Row(23, [7], [(1, 2)]),
)


def make_model() -> MllamaForConditionalGeneration:
    """The model with weights in which no gate is zero and no norm is one."""
    plain = json.loads(json.dumps(CONFIG))
    # Llama-3.2-Vision's intermediate states are those that enter the named layers, as Meta's code
    # and transformers up to 4.46 have it. transformers 5 takes those that leave them: name the
    # layers before.
    assert transformers.__version__.startswith("5."), transformers.__version__
    vision = plain["vision_config"]
    vision["intermediate_layers_indices"] = [
        layer - 1 for layer in vision["intermediate_layers_indices"]
    ]
    config = MllamaConfig.from_dict(plain)
    config._attn_implementation = "eager"
    model = MllamaForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name.endswith(("gate", "gate_attn", "gate_ffn")):
                parameter.uniform_(0.3, 1.2)
            elif "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.25)
    return model


def make_batch() -> dict[str, Tensor]:
    """Inputs as transformers' processor makes them, with random pixels and tokens."""
    length = max(row.length for row in ROWS)
    tokens = torch.randint(10, VOCAB, (len(ROWS), length))
    attention = torch.zeros(len(ROWS), length, dtype=torch.long)
    labels = torch.full((len(ROWS), length), -100)
    for n, row in enumerate(ROWS):
        tokens[n, row.length :] = PAD
        tokens[n, row.marks] = IMAGE
        attention[n, : row.length] = 1
        labels[n, 3 : row.length] = tokens[n, 3 : row.length]
    labels[tokens == IMAGE] = -100
    ratios = [row.ratios for row in ROWS]
    tiles = [[wide * high for wide, high in row] for row in ratios]
    size = CONFIG["vision_config"]["image_size"]
    images = max(map(len, ratios))
    pixels = torch.zeros(len(ROWS), images, 4, 3, size, size)
    for n, counts in enumerate(tiles):
        for m, count in enumerate(counts):
            pixels[n, m, :count] = torch.randn(count, 3, size, size)
    spans = [
        get_cross_attention_token_mask(tokens[n, : row.length].tolist(), IMAGE)
        for n, row in enumerate(ROWS)
    ]
    mask = convert_sparse_cross_attention_mask_to_dense(spans, tiles, 4, length)
    return {
        "input_ids": tokens,
        "attention_mask": attention,
        "labels": labels,
        "pixel_values": pixels,
        "aspect_ratio_ids": torch.from_numpy(convert_aspect_ratios_to_ids_np(ratios, 4)),
        "aspect_ratio_mask": torch.from_numpy(build_aspect_ratio_mask_np(ratios, 4)),
        "cross_attention_mask": torch.from_numpy(mask),
    }


def name_on_disk(name: str) -> str:
    """A parameter's name as Llama-3.2-Vision's checkpoints have it."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    return name.removeprefix("model.").replace("language_model.", "language_model.model.", 1)


def run(model: MllamaForConditionalGeneration, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model makes of the batch, its gradients, and greedy tokens after the first row."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    vision = model.model.vision_model(
        batch["pixel_values"], batch["aspect_ratio_ids"], batch["aspect_ratio_mask"]
    ).last_hidden_state
    projected = model.model.multi_modal_projector(vision)
    output = model(**inputs, labels=batch["labels"], use_cache=False)
    output.loss.backward()
    out = {
        "vision_output": vision,
        "projected": projected,
        "logits": output.logits,
        "loss": output.loss[None],
    }
    for name, parameter in model.named_parameters():
        if name_on_disk(name) in GRADIENTS:
            out[f"grad.{name_on_disk(name)}"] = parameter.grad
    first = {key: value[:1] for key, value in inputs.items()}
    greedy = []
    for _ in range(GREEDY):
        logits = model(**first, use_cache=False).logits
        greedy.append(logits[0, -1].argmax())
        for key, new in (
            ("input_ids", greedy[-1][None, None]),
            ("attention_mask", first["attention_mask"][:, -1:]),
            ("cross_attention_mask", first["cross_attention_mask"][:, -1:]),
        ):
            first[key] = torch.cat((first[key], new), dim=1)
    return {**out, "greedy": torch.stack(greedy)}


def main() -> None:
    """Writes both files."""
    torch.manual_seed(22)
    model, batch = make_model(), make_batch()
    out = run(model, batch)
    missing = {f"grad.{name}" for name in GRADIENTS} - set(out)
    assert not missing, missing
    weights = {f"model.{name_on_disk(name)}": value for name, value in model.named_parameters()}
    tensors = {**weights, **batch, **out}
    path = HERE / "mllama.safetensors"
    save_file({key: value.detach().contiguous() for key, value in tensors.items()}, path)
    (HERE / "mllama.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB, loss {out['loss'].item():.4f}")
    print("greedy", out["greedy"].tolist())


if __name__ == "__main__":
    main()
