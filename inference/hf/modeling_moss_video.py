"""MOSS-Video as transformers loads it: `AutoModelForImageTextToText`, `trust_remote_code=True`.

A copy of this file is in every exported folder. Parameters have the names of transformers 5's
Mllama (`model.language_model.*`, `model.vision_model.*`, `lm_head.*`), and those are saved; files
with the names of transformers 4 (`language_model.model.*`, `vision_model.*`) load too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .attended_moss_video import (
    AttendedFrames,
    CachedTokens,
    NewFrames,
    cache_of_pass,
    check_frame_mask,
    keep_frames,
    leave_out_cached_frames,
    real_frames,
    token_mask,
    token_positions,
)
from .configuration_moss_video import MossVideoConfig
from .decoder_moss_video import READ_ONLY_ROWS, Decoder, RMSNorm, Rotation
from .vision_moss_video import VisionTower, join_states

IGNORED_LABEL = -100  # no loss there
OLD_NAMES = {
    r"^language_model\.model\.": "model.language_model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^(vision_model|multi_modal_projector|patch_merger)\.": r"model.\1.",
}


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
        """Encodes frames to the states that the decoder attends `[N, T x P, H]`.

        pixels: normalized `[N, T, 3, h, w]`. Ratio ids are `[N]`, real tiles `[N, T]`.
        """
        states = self.vision_model(pixels, ratio_ids, tiles)
        config = self.config
        joined = join_states(states, config.pool_mode, config.pool_stride, self.patch_merger)
        return self.multi_modal_projector(joined).flatten(1, 2)


HARMLESS = {"return_dict", "cache_position"}  # transformers passes them; nothing follows from them


class MossVideoForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The model with its output head."""

    config_class = MossVideoConfig
    # None, for transformers 4 would take a file of old names for one of the base model.
    base_model_prefix = ""
    main_input_name = "input_ids"
    _no_split_modules = ("VisionLayer", "SelfLayer", "CrossLayer")
    _supports_sdpa = True
    supports_gradient_checkpointing = True
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
        """transformers' `from_pretrained`; also reads weights with the names of transformers 4."""
        kwargs.setdefault("key_mapping", OLD_NAMES)
        return super().from_pretrained(*args, **kwargs)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **kwargs: Any
    ) -> None:
        """transformers' own, always with `use_reentrant=False`: a layer gets the keys and values of
        frames in an object, and the reentrant form gives those no gradient."""
        function = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, function, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.language_model.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.model.language_model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> nn.Module:
        """transformers' own; the embedding keeps its rows beyond the head's, for tokens that are
        read and never said, without which a saved model does not load.

        Raises:
            ValueError: `<|image|>` would have no row.
        """
        old = self.model.language_model.embed_tokens.weight.detach().clone()
        image = self.config.image_token_index
        if new_num_tokens is not None and image >= new_num_tokens + READ_ONLY_ROWS:
            raise ValueError(
                f"new_num_tokens={new_num_tokens}: <|image|> (image_token_index {image}) needs a "
                f"row: at least {image + 1 - READ_ONLY_ROWS}"
            )
        made = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        rows = self.config.text_config.vocab_size + READ_ONLY_ROWS
        if len(made.weight) == rows:
            return made
        weight = made.weight.detach()
        kept = torch.cat((weight, old[len(weight) : rows].to(weight)))
        kept = F.pad(kept, (0, 0, 0, rows - len(kept)))
        made = nn.Embedding(len(kept), kept.shape[1], _weight=kept)
        self.set_input_embeddings(made)
        return made

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
        """Encodes frames `[B, F, T, 3, h, w]` to the states that text attends `[B, F, T x P, H]`.
        Without ids a frame is one tile; without a mask its tiles follow from its id."""
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
        marks_alone: bool = False,
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
                sees a token `[B, 1, S, past + S]` (of floats: 0 there, else negative).
            cross_attention_mask: 1 where a token sees a tile `[B, S, F, T]`, of the frames in the
                cache, too; None: each token sees the frames whose `<|image|>` it or a token before
                it is.
            cross_attention_states: `get_image_features`, in place of `pixel_values`.
            position_ids: `[B, S]`; None: the index among the tokens that are not padding.
            past_key_values: a DynamicCache. Frames in it stay visible; new frames join them. Not
                in training with gradient checkpointing.
            inputs_embeds: in place of embedded `input_ids`; frames need both.
            labels: `[B, S]`, not shifted; -100 and `<|image|>` are ignored, silence weighs
                `silence_weight`. The sum is divided by `num_items_in_batch`, or their count.
            logits_to_keep: logits of so many last positions only, or of these positions.
            marks_alone: without frames, an `<|image|>` is a token like others: where the model has
                said it itself, or is to be shown nothing.
        """
        given = {name for name, value in kwargs.items() if value is not None and value is not False}
        unknown = sorted(given - HARMLESS)
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: this model has no such input or output")
        decoder = self.model.language_model
        x = decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        wanted = not self.training and labels is None if use_cache is None else use_cache
        again = self.training and any(layer.gradient_checkpointing for layer in decoder.layers)
        past_key_values = cache_of_pass(past_key_values, wanted, again)
        past = self._past(past_key_values)
        position_ids = token_positions(position_ids, attention_mask, past, x)
        if pixel_values is not None:
            if cross_attention_states is not None:
                raise ValueError("give pixel_values or cross_attention_states, not both")
            cross_attention_states = self.get_image_features(
                pixel_values, aspect_ratio_ids, aspect_ratio_mask
            )
        new = None
        if cross_attention_states is not None:
            real = real_frames(pixel_values, aspect_ratio_ids, cross_attention_states)
            size = cross_attention_states.shape[2]
            new = self._new_frames(input_ids, position_ids, real)
            new.slots = new.slots if aspect_ratio_ids is None else aspect_ratio_ids > 0
            ids = real.long() if aspect_ratio_ids is None else aspect_ratio_ids
            tiles = self._tiles(ids, aspect_ratio_mask, size // self.config.tokens_per_frame)
            new.seen = new.seen & tiles[:, None]  # [B, S, F, T]
        elif input_ids is not None and not marks_alone:
            self._check_marks(input_ids, [0] * len(input_ids))
        frames = self._frames(x, cross_attention_states, new, cross_attention_mask, past_key_values)
        tokens = self.tokens_type(past_key_values, token_mask(attention_mask, past, x.shape[1]))
        x = decoder(x, position_ids, tokens, frames)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, keep])
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels, num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _past(self, cache: Any) -> int:
        """The number of tokens in the cache."""
        cross = self.model.language_model.cross
        layers = range(self.config.text_config.num_hidden_layers)
        return 0 if cache is None else int(cache.get_seq_length(min(set(layers) - set(cross))))

    def _frames(
        self,
        x: Tensor,
        states: Tensor | None,
        new: NewFrames | None,
        mask: Tensor | None,
        cache: Any,
    ) -> AttendedFrames | None:
        """The frames of a pass over `x` `[B, S, H]`: those in the cache, and `new` ones with
        `states` `[B, F, T x P, H]`. `mask` says which token sees what, of all of them; None: as
        `new` says."""
        # What the last token so far saw of the frames in the cache [B, F, T], and which of them
        # are of a row [B, F].
        old: Tensor | None = getattr(cache, "seen_tiles", None)
        if states is None and old is None:
            return None
        given, shape = mask is not None, tuple(x.shape[:2])
        kept = [] if old is None else [(cache.own_frames, cache.frame_slots)]
        kept += [] if new is None else [(new.marked, new.slots)]
        own, slots = (torch.cat(parts, dim=1) for parts in zip(*kept, strict=True))
        if mask is None:
            parts = [] if old is None else [old[:, None].expand(-1, shape[1], -1, -1)]
            mask = torch.cat(parts if new is None else [*parts, new.seen], dim=2)
        if given:  # before the cache takes the new ones
            seen = [one for one in (old, None if new is None else new.seen) if one is not None]
            check_frame_mask(mask, (*shape, own.shape[1], seen[0].shape[-1]))
        keys_values = self._keys_values(states, new, cache, x.device)
        mask = mask.bool()
        if cache is not None:
            cache.seen_tiles, cache.own_frames, cache.frame_slots = mask[:, -1], own, slots
        if given:  # padding frames are attended too, as transformers' Mllama does
            slots = torch.ones_like(slots)
        attend_all = self.config.tokens_before_first_frame == "attend_all"
        return AttendedFrames(keys_values, mask, own, slots if attend_all else None, x.dtype)

    def _new_frames(
        self, input_ids: Tensor | None, position_ids: Tensor, real: Tensor
    ) -> NewFrames:
        """Where frames stand: `real` `[B, F]` is False for padding frames.

        Raises:
            ValueError: a row has more or fewer `<|image|>` tokens than frames.
        """
        if input_ids is None:
            raise ValueError("frames need input_ids: their <|image|> tokens say where they stand")
        is_image = self._check_marks(input_ids, real.sum(1).tolist())
        number = is_image.cumsum(1)[:, :, None]  # frames up to each token
        frames = torch.arange(1, real.shape[1] + 1, device=is_image.device)
        own = is_image[:, :, None] & (number == frames)  # [B, S, F]
        positions = (own * position_ids[:, :, None]).sum(1)
        return NewFrames(positions, own.any(1), own.any(1), (number >= frames)[..., None])

    def _check_marks(self, input_ids: Tensor, given: list[int]) -> Tensor:
        """True for `<|image|>` `[B, S]`. ValueError unless rows have as many as frames `given`."""
        is_image = input_ids == self.config.image_token_index
        marks = is_image.sum(1).tolist()
        if marks != given:
            raise ValueError(
                f"the rows have {marks} <|image|> tokens, but {given} frames are given: one "
                "<|image|> for each frame (padding frames, after the others: aspect_ratio_ids 0)"
            )
        return is_image

    def _keys_values(
        self, states: Tensor | None, new: NewFrames | None, cache: Any, device: torch.device
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values of frames for each cross-attention layer, new frames appended to the
        cached ones."""
        decoder = self.model.language_model
        if states is None or new is None:
            layers = {i: cache.layers[i] for i in decoder.cross}  # on the CPU, if offloaded
            return {i: (c.keys.to(device), c.values.to(device)) for i, c in layers.items()}
        each = new.positions.repeat_interleave(states.shape[2], dim=1)  # [B, F x T x P]
        rotation = decoder.rotation(each, states.dtype)
        keys_values = {}
        for layer in decoder.cross:
            k, v = self._project(layer, states.flatten(1, 2), rotation)
            keys_values[layer] = (k, v) if cache is None else cache.update(k, v, layer)
            if cache is not None:
                keep_frames(cache, layer)
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
        """Frames go in once: later passes find them in the cache, and so does a further turn that
        begins with the cache of the last one."""
        first = bool(is_first_iteration)
        for name in ("tokenizer", "assistant_tokenizer"):  # of generate: what stop_strings need
            kwargs.pop(name, None)
        inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=first, **kwargs
        )
        if self._past(inputs.get("past_key_values")) > 0:
            leave_out_cached_frames(inputs, self.config.image_token_index, first)
        inputs["marks_alone"] = not first
        return inputs


# What save_pretrained writes can be opened by itself: it copies these files and names the class.
MossVideoForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["MossVideoForConditionalGeneration"]
