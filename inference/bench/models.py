"""Makes models of MOSS-Video's shape with random weights, on which timings do not depend."""

from __future__ import annotations

from typing import Any

import torch

from inference.hf.configuration_moss_video import MossVideoConfig
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration

ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
TEXT_11B: dict[str, Any] = {
    "rope_parameters": ROPE,
    "eos_token_id": None,
}  # the rest are Mllama's defaults
VISION_11B = {"image_size": 560}

# Like MOSS-Video in what decides the speed (101 vision tokens a frame, 4 query heads a KV head,
# every fifth layer attends frames), but of a size for a CPU.
TEXT_MID: dict[str, Any] = {
    **TEXT_11B, "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816,
    "num_hidden_layers": 20, "num_attention_heads": 16, "num_key_value_heads": 4,
    "cross_attention_layers": [3, 8, 13, 18], "bos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
VISION_MID = {
    "image_size": 280, "hidden_size": 512, "intermediate_size": 2048, "attention_heads": 8,
    "num_hidden_layers": 6, "num_global_layers": 2, "intermediate_layers_indices": [1, 3, 4],
    "vision_output_dim": 2048,
}  # fmt: skip
TEXT_SMALL = {
    **TEXT_MID, "vocab_size": 2000, "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 1,
    "cross_attention_layers": [3],
}  # fmt: skip
VISION_SMALL = {
    **VISION_MID, "image_size": 56, "hidden_size": 32, "intermediate_size": 64,
    "attention_heads": 2, "num_hidden_layers": 2, "num_global_layers": 1,
    "intermediate_layers_indices": [1], "vision_output_dim": 64,
}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "11b": (TEXT_11B, VISION_11B, 4),
    "mid": (TEXT_MID, VISION_MID, 2),
    "small": (TEXT_SMALL, VISION_SMALL, 2),
}


def random_model(
    name: str, device: torch.device, dtype: torch.dtype
) -> MossVideoForConditionalGeneration:
    """A model of `MODELS`, made on the device."""
    text, vision, stride = MODELS[name]
    vocabulary = int(text.get("vocab_size", 128256))
    config = MossVideoConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=vocabulary,
        silence_token_id=11,
        pool_mode="average",
        pool_stride=stride,
        moss_stage="realtime_sft",
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = MossVideoForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.5)
    return model.eval()
