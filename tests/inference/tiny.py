"""Tiny models for the tests of inference: random weights, the toy tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from data_pipeline.tokens import build_toy_tokenizer
from inference.hf.configuration_moss_video import MossVideoConfig
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from inference.hf.processing_moss_video import MossVideoProcessor

TEMPLATE = Path(__file__).resolve().parents[2] / "inference" / "hf" / "chat_template.jinja"
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
SIZE = 56  # pixels of a tile


def tiny_config(**changes: Any) -> MossVideoConfig:
    """Six layers, two of them cross-attention; five vision tokens a frame."""
    vision = {
        "hidden_size": 32, "num_hidden_layers": 4, "num_global_layers": 2, "attention_heads": 4,
        "intermediate_size": 64, "image_size": SIZE, "patch_size": 14, "vision_output_dim": 96,
        "intermediate_layers_indices": [1, 3],
    }  # fmt: skip
    text = {
        "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "cross_attention_layers": [1, 4],
        "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    }  # fmt: skip
    settings = {
        "vision_config": vision, "text_config": text, "image_token_index": 512,
        "pool_mode": "average", "pool_stride": 2, "tokens_before_first_frame": "zero",
        "silence_weight": 0.1,
        "moss_stage": "realtime_sft",
    }  # fmt: skip
    return MossVideoConfig(**{**settings, **changes})


def randomize(model: nn.Module, seed: int = 3) -> None:
    """Weights in which no gate is zero and no norm is one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif "gate" in name.rsplit(".", 1)[-1]:
                parameter.copy_(0.7 + 0.2 * noise)
            else:
                parameter.copy_(0.2 * noise)


def tiny_model(**changes: Any) -> MossVideoForConditionalGeneration:
    model = MossVideoForConditionalGeneration(tiny_config(**changes)).eval()
    randomize(model)
    return model


def generated_logits(model: MossVideoForConditionalGeneration, **inputs: Any) -> torch.Tensor:
    """Logits from which `generate` takes 8 tokens `[8, B, V]`."""
    out = model.generate(
        **inputs,
        max_new_tokens=8,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(out.logits)


def save_tiny(folder: Path, **changes: Any) -> Path:
    """Writes the folder that AutoModel, AutoProcessor and the engine open."""
    build_toy_tokenizer(folder, ["A man walks in and sits down."])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = {
        "silence_token_id": tokenizer.convert_tokens_to_ids("<|silence|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video|>"),
    }
    tiny_model(**{**ids, **changes}).save_pretrained(folder)
    images = MllamaImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, max_image_tiles=1, image_mean=MEAN, image_std=STD
    )
    processor = MossVideoProcessor(images, tokenizer, chat_template=TEMPLATE.read_text())
    processor.save_pretrained(folder)
    return folder
