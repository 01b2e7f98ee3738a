"""Configuration of MOSS-Video: transformers' Mllama with the keys that a video model adds.

A copy of this file is in every exported folder.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

POOLS = ("none", "average", "max", "bilinear", "channel_fusion")


class MossVideoConfig(PretrainedConfig):
    """Sizes (`vision_config`, `text_config`: Mllama's) and what is MOSS-Video's own.

    Without pooling keys it is plain Llama-3.2-Vision, and computes what that computes.

    Args:
        vision_config, text_config: Mllama's, as mappings or objects. `intermediate_layers_indices`
            are the layers that the kept states *enter*, as in Meta's code and in transformers up
            to 4.46; transformers 5 takes the states that leave them.
        image_token_index: id of `<|image|>`, one for each frame (`image_token_id` is the same).
        pool_mode, pool_stride: pooling of the patch grid, one of `POOLS`.
        full_attention: vision attention without masks; None: True where patches are pooled.
        cross_attention_rope: rotary positions in cross-attention; None: True where patches are
            pooled.
        tokens_before_first_frame: tokens that see no frame attend all (`attend_all`, as
            transformers does) or nothing (`zero`).
        silence_token_id, silence_weight: labels of this token weigh so much in the loss.
        video_token_id: id of `<|video|>`, which a processor expands into frames.
        moss_stage: name of the training stage that made the weights; None: unknown.
        moss_prompt_form: form of the prompts that the weights were trained with (`pretrain`,
            `chat`, `realtime`); None: what the stage's name says.

    `vision`, `text` and `pool: {mode, stride}` are read as names of the same.
    """

    model_type = "moss_video"
    attribute_map = {"image_token_id": "image_token_index"}  # noqa: RUF012
    sub_configs = {  # noqa: RUF012
        "text_config": MllamaTextConfig,
        "vision_config": MllamaVisionConfig,
    }

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        image_token_index: int = 128256,
        pool_mode: str = "none",
        pool_stride: int = 1,
        full_attention: bool | None = None,
        cross_attention_rope: bool | None = None,
        tokens_before_first_frame: str = "attend_all",
        silence_token_id: int | None = None,
        silence_weight: float = 1.0,
        video_token_id: int | None = None,
        moss_stage: str | None = None,
        moss_prompt_form: str | None = None,
        **kwargs: Any,
    ):
        # The name in the exports of earlier versions.
        tokens_before_first_frame = kwargs.pop("blind_rows", tokens_before_first_frame)
        pool = kwargs.pop("pool", None) or {}
        pool_mode, pool_stride = pool.get("mode", pool_mode), pool.get("stride", pool_stride)
        if pool_mode not in POOLS:
            raise ValueError(f"config.json: pool_mode {pool_mode!r}, allowed: {', '.join(POOLS)}")
        if tokens_before_first_frame not in ("attend_all", "zero"):
            raise ValueError(
                f"config.json: tokens_before_first_frame {tokens_before_first_frame!r}, "
                "allowed: attend_all, zero"
            )
        pooled = pool_mode != "none"
        self.vision_config = _part(kwargs.pop("vision", vision_config), MllamaVisionConfig)
        self.text_config = _part(kwargs.pop("text", text_config), MllamaTextConfig)
        self.image_token_index = kwargs.pop("image_token_id", image_token_index)
        self.pool_mode, self.pool_stride = pool_mode, pool_stride
        self.full_attention = pooled if full_attention is None else full_attention
        self.cross_attention_rope = pooled if cross_attention_rope is None else cross_attention_rope
        self.tokens_before_first_frame = tokens_before_first_frame
        self.silence_token_id, self.silence_weight = silence_token_id, silence_weight
        self.video_token_id = video_token_id
        self.moss_stage, self.moss_prompt_form = moss_stage, moss_prompt_form
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    @property
    def tokens_per_frame(self) -> int:
        """Vision tokens of one tile after pooling, the class token among them."""
        grid = self.vision_config.image_size // self.vision_config.patch_size
        return (grid // self.pool_stride) ** 2 + 1


def _part(value: Any, kind: type[PretrainedConfig]) -> PretrainedConfig:
    return value if isinstance(value, PretrainedConfig) else kind(**(value or {}))


MossVideoConfig.register_for_auto_class()

__all__ = ["MossVideoConfig"]
