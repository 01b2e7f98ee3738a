"""MOSS-Video as transformers loads it: `AutoModelForImageTextToText`, `trust_remote_code=True`.

A copy of this file is in every exported folder. Parameters have the names of transformers 5's
Mllama (`model.language_model.*`, `model.vision_model.*`, `lm_head.*`), and those are saved; files
with the names of transformers 4 (`language_model.model.*`, `vision_model.*`) load too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_moss_video import MossVideoConfig
from .decoder_moss_video import Decoder, RMSNorm, Rotation, attend
from .vision_moss_video import VisionTower, join_states

IGNORED_LABEL = -100  # no loss there
OLD_NAMES = {
    r"^language_model\.model\.": "model.language_model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^(vision_model|multi_modal_projector|patch_merger)\.": r"model.\1.",
}


class CachedTokens:
    """`TokenCache` in a transformers cache (None: nothing is kept)."""

    def __init__(self, cache: Any, mask: Tensor | None):
        self.cache, self.mask = cache, mask

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.cache is not None:
            k, v = self.cache.update(k, v, layer)
        causal = self.mask is None and q.shape[2] > 1
        return attend(q, k, v, self.mask, causal)


class AttendedFrames:
    """`FrameCache` of one forward pass.

    keys_values: of each cross-attention layer, `[B, KV heads, F x T x P, D]`.
    mask: True where a token sees a tile `[B, S, F, T]`.
    attend_all: tokens that see no frame attend everything, padding frames too.
    """

    def __init__(
        self,
        keys_values: dict[int, tuple[Tensor, Tensor]],
        mask: Tensor,
        attend_all: bool,
        dtype: torch.dtype,
    ):
        self.keys_values = keys_values
        mask = mask.flatten(2)  # [B, S, F x T]
        sees = mask.any(-1, keepdim=True)
        # A row without any key would be NaN: let it attend everything, then drop it.
        mask = mask | ~sees
        self.sees = None if bool(sees.all()) else sees.to(dtype)
        self.keep = None if attend_all else self.sees
        self.mask = None if bool(mask.all()) else mask[:, None]

    def attend(self, layer: int, q: Tensor) -> Tensor:
        k, v = self.keys_values[layer]
        mask = self.mask
        if mask is not None:
            mask = mask.repeat_interleave(k.shape[2] // mask.shape[-1], dim=-1)
        out = attend(q, k, v, mask)
        return out if self.keep is None else out * self.keep[:, None]


class MossVideoModel(nn.Module):
    """Vision tower, projector and decoder, under the names of the checkpoint."""

    def __init__(self, config: MossVideoConfig):
        super().__init__()
        self.config = config
        width = config.vision_config.vision_output_dim
        self.vision_model = VisionTower(config)
        self.patch_merger = None
        if config.pool_mode == "channel_fusion":
            stride = config.pool_stride
            self.patch_merger = nn.Conv2d(width, width, stride, stride=stride, bias=False)
        self.multi_modal_projector = nn.Linear(width, config.text_config.hidden_size)
        self.language_model = Decoder(config)

    def encode(self, pixels: Tensor, ratio_ids: Tensor, tiles: Tensor) -> Tensor:
        """Normalized frames `[N, T, 3, h, w]`, their ratio ids `[N]` and real tiles `[N, T]` ->
        the states that the decoder attends `[N, T x P, H]`."""
        states = self.vision_model(pixels, ratio_ids, tiles)
        config = self.config
        joined = join_states(states, config.pool_mode, config.pool_stride, self.patch_merger)
        return self.multi_modal_projector(joined).flatten(1, 2)


class MossVideoForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The model with its output head."""

    config_class = MossVideoConfig
    # None, for transformers 4 would take a file of old names for one of the base model.
    base_model_prefix = ""
    main_input_name = "input_ids"
    _no_split_modules = ("VisionLayer", "SelfLayer", "CrossLayer")
    _supports_sdpa = True
    _tied_weights_keys = None
    tokens_type = CachedTokens

    def __init__(self, config: MossVideoConfig):
        super().__init__(config)
        text = config.text_config
        self.model = MossVideoModel(config)
        self.lm_head: nn.Module = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> MossVideoForConditionalGeneration:
        """transformers' `from_pretrained`, which reads the names of transformers 4 too."""
        kwargs.setdefault("key_mapping", OLD_NAMES)
        return super().from_pretrained(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.language_model.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.model.language_model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.text_config.initializer_range
        for name, parameter in module.named_parameters(recurse=False):
            if getattr(parameter, "_is_hf_initialized", False):
                continue
            if isinstance(module, RMSNorm | nn.LayerNorm) and name == "weight":
                parameter.fill_(1.0)
            elif name == "bias" or name.endswith("gate"):
                parameter.zero_()
            elif not name.startswith("gate_"):  # gates of vision keep what they are made with
                parameter.normal_(std=std)

    def get_image_features(
        self,
        pixel_values: Tensor,
        aspect_ratio_ids: Tensor | None = None,
        aspect_ratio_mask: Tensor | None = None,
    ) -> Tensor:
        """Frames `[B, F, T, 3, h, w]` -> the states that text attends `[B, F, T x P, H]`.

        Without ids a frame is one tile, without mask its tiles follow from its id.
        """
        batch, frames, count = pixel_values.shape[:3]
        if aspect_ratio_ids is None:
            if count > 1:
                raise ValueError(f"pixel_values has {count} tiles: aspect_ratio_ids is needed")
            aspect_ratio_ids = pixel_values.new_ones((batch, frames), dtype=torch.long)
        tiles = self._tiles(aspect_ratio_ids, aspect_ratio_mask, count)
        states = self.model.encode(
            pixel_values.flatten(0, 1), aspect_ratio_ids.flatten(), tiles.flatten(0, 1)
        )
        return states.unflatten(0, (batch, frames))

    def _tiles(self, ratio_ids: Tensor, mask: Tensor | None, count: int) -> Tensor:
        """Real tiles `[B, F, T]`; no image (id 0) counts as one tile, as transformers has it."""
        if mask is not None:
            return mask[..., :count].bool()
        ratios = self.config.vision_config.supported_aspect_ratios
        used = torch.tensor([1, *(a * b for a, b in ratios)], device=ratio_ids.device)[ratio_ids]
        return torch.arange(count, device=ratio_ids.device) < used[..., None]

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        aspect_ratio_mask: Tensor | None = None,
        aspect_ratio_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_mask: Tensor | None = None,
        cross_attention_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One pass.

        Args:
            input_ids: `[B, S]`, one `<|image|>` for each frame.
            pixel_values: normalized frames `[B, F, T, 3, h, w]`; rows with fewer frames end in
                padding frames (zeros, ratio id 0).
            aspect_ratio_ids, aspect_ratio_mask: `[B, F]` and `[B, F, T]`, as
                `get_image_features`.
            attention_mask: 0 for padding `[B, past + S]`, on either side; or True where a token
                sees a token `[B, 1, S, past + S]`.
            cross_attention_mask: 1 where a token sees a tile `[B, S, F, T]`; None: each token sees
                the frames whose `<|image|>` it or a token before it is.
            cross_attention_states: `get_image_features`, in place of `pixel_values`.
            position_ids: `[B, S]`; None: the index among the tokens that are not padding.
            past_key_values: a DynamicCache. Frames in it stay visible; new frames join them.
            inputs_embeds: in place of embedded `input_ids`; frames need both.
            labels: `[B, S]`, not shifted; -100 and `<|image|>` are ignored, silence weighs
                `silence_weight`. The sum is divided by `num_items_in_batch`, or their count.
            logits_to_keep: logits of so many last positions only, or of these positions.
        """
        decoder = self.model.language_model
        x = decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = use_cache if use_cache is not None else not self.training and labels is None
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()
        past = self._past(past_key_values)
        if position_ids is None:
            position_ids = _positions(attention_mask, past, x)
        position_ids = position_ids.expand(len(x), -1)
        if pixel_values is not None:
            if cross_attention_states is not None:
                raise ValueError("give pixel_values or cross_attention_states, not both")
            cross_attention_states = self.get_image_features(
                pixel_values, aspect_ratio_ids, aspect_ratio_mask
            )
        positions, seen = None, None
        if cross_attention_states is not None:
            frame_count, size = cross_attention_states.shape[1:3]
            positions, seen = self._frame_positions(input_ids, position_ids, frame_count)
            ids = torch.ones_like(positions) if aspect_ratio_ids is None else aspect_ratio_ids
            tiles = self._tiles(ids, aspect_ratio_mask, size // self.config.tokens_per_frame)
            seen = seen[..., None] & tiles[:, None]  # [B, S, F, T]
        frames = self._frames(
            x, cross_attention_states, positions, seen, cross_attention_mask, past_key_values
        )
        tokens = self.tokens_type(past_key_values, _token_mask(attention_mask, past, x.shape[1]))
        x = decoder(x, position_ids, tokens, frames)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, keep])
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels, num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _past(self, cache: Any) -> int:
        """Tokens in the cache."""
        cross = self.model.language_model.cross
        layers = range(self.config.text_config.num_hidden_layers)
        return 0 if cache is None else int(cache.get_seq_length(min(set(layers) - set(cross))))

    def _frames(
        self,
        x: Tensor,
        states: Tensor | None,
        positions: Tensor | None,
        seen: Tensor | None,
        mask: Tensor | None,
        cache: Any,
    ) -> AttendedFrames | None:
        """The frames of a pass over `x` `[B, S, H]`: those in the cache, and new `states`
        `[B, F, T x P, H]` at `positions`, of which tokens see `seen` `[B, S, F, T]`, if `mask`
        does not say it of all of them."""
        # What the last token so far saw of the frames in the cache: [B, F, T].
        old = getattr(cache, "seen_tiles", None)
        if states is None and old is None:
            return None
        shape = tuple(x.shape[:2])
        if mask is None:
            parts = [] if old is None else [old[:, None].expand(-1, shape[1], -1, -1)]
            mask = torch.cat(parts if seen is None else [*parts, seen], dim=2)
        elif tuple(mask.shape[:2]) != shape:
            raise ValueError(
                f"cross_attention_mask is of {tuple(mask.shape[:2])} rows and tokens, "
                f"the input of {shape}"
            )
        mask = mask.bool()
        keys_values = self._keys_values(states, positions, cache)
        if cache is not None:
            cache.seen_tiles = mask[:, -1]
        attend_all = self.config.tokens_before_first_frame == "attend_all"
        return AttendedFrames(keys_values, mask, attend_all, x.dtype)

    def _frame_positions(
        self, input_ids: Tensor | None, position_ids: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """Positions of `count` frames `[B, F]` (padding frames: 0), and True where a token is or
        comes after a frame's `<|image|>` `[B, S, F]`."""
        if input_ids is None:
            raise ValueError("frames need input_ids: their <|image|> tokens say where they stand")
        is_image = input_ids == self.config.image_token_index  # [B, S]
        most = int(is_image.sum(1).max())
        if most > count:
            raise ValueError(f"a row has {most} <|image|> tokens, but {count} frames are given")
        number = is_image.cumsum(1)[:, :, None]  # frames up to each token
        frames = torch.arange(1, count + 1, device=is_image.device)
        own = is_image[:, :, None] & (number == frames)  # [B, S, F]
        return (own * position_ids[:, :, None]).sum(1), number >= frames

    def _keys_values(
        self, states: Tensor | None, positions: Tensor | None, cache: Any
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Of each cross-attention layer, new frames appended to the cached ones."""
        decoder = self.model.language_model
        if states is None:
            return {i: (cache.layers[i].keys, cache.layers[i].values) for i in decoder.cross}
        assert positions is not None
        each = positions.repeat_interleave(states.shape[2], dim=1)  # [B, F x T x P]
        rotation = decoder.rotation(each, states.dtype)
        keys_values = {}
        for layer in decoder.cross:
            k, v = self._project(layer, states.flatten(1, 2), rotation)
            keys_values[layer] = (k, v) if cache is None else cache.update(k, v, layer)
        return keys_values

    def _project(self, layer: int, states: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        return self.model.language_model.cross_attention(layer).project(states, rotation)

    def _loss(self, logits: Tensor, labels: Tensor, count: Tensor | int | None) -> Tensor:
        config = self.config
        targets = labels[:, 1:].masked_fill(
            labels[:, 1:] == config.image_token_index, IGNORED_LABEL
        )
        targets = targets.flatten().to(logits.device)
        losses = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            targets,
            ignore_index=IGNORED_LABEL,
            reduction="none",
        )
        if config.silence_token_id is not None:
            silent = targets == config.silence_token_id
            losses = torch.where(silent, losses * config.silence_weight, losses)
        labelled = (targets != IGNORED_LABEL).sum().clamp(min=1)
        return losses.sum() / (labelled if count is None else count)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, is_first_iteration: bool | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Frames go in once: later passes find them in the cache."""
        if is_first_iteration is not None:
            kwargs["is_first_iteration"] = is_first_iteration
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if self._past(inputs.get("past_key_values")) > 0:
            for name in (
                "pixel_values",
                "aspect_ratio_ids",
                "aspect_ratio_mask",
                "cross_attention_mask",
                "cross_attention_states",
            ):
                inputs[name] = None
        return inputs


def _positions(attention_mask: Tensor | None, past: int, x: Tensor) -> Tensor:
    length = x.shape[1]
    if attention_mask is None or attention_mask.ndim != 2:
        return torch.arange(past, past + length, device=x.device)[None]
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]


def _token_mask(attention_mask: Tensor | None, past: int, length: int) -> Tensor | None:
    """True where a token sees a token `[B, 1, S, past + S]`; None: causal without padding."""
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask if attention_mask.dtype is torch.bool else attention_mask >= 0
    if attention_mask is None or bool(attention_mask.all()):
        if past == 0 or length == 1:
            return None
        device = None if attention_mask is None else attention_mask.device
        return _causal(past, length, device)[None, None]
    mask = attention_mask.bool()[:, None, None] & _causal(past, length, attention_mask.device)
    # Padding on the left sees nothing: let it see itself, for a softmax over nothing is NaN.
    own = torch.eye(past + length, device=mask.device, dtype=torch.bool)[past:]
    return mask | own


def _causal(past: int, length: int, device: torch.device | None) -> Tensor:
    key = torch.arange(past + length, device=device)
    return key <= torch.arange(past, past + length, device=device)[:, None]


# What save_pretrained writes can be opened by itself: it copies these files and names the class.
MossVideoForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["MossVideoForConditionalGeneration"]
