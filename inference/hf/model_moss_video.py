"""The model without its output head: frames and tokens in, hidden states out (`AutoModel`).

A copy of this file is in every exported folder.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, __version__
from transformers.modeling_outputs import BaseModelOutputWithPast

from .attended_moss_video import (
    AttendedFrames,
    CachedTokens,
    NewFrames,
    cache_of_pass,
    check_frame_mask,
    frames_in,
    hold_frames,
    real_frames,
    token_mask,
    token_positions,
)
from .configuration_moss_video import MossVideoConfig
from .decoder_moss_video import Decoder, RMSNorm, Rotation
from .vision_moss_video import VisionTower, join_states

OLD_NAMES = {
    r"^language_model\.model\.": "model.language_model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^(vision_model|multi_modal_projector|patch_merger)\.": r"model.\1.",
}
# transformers 5 takes `model.` off itself where it opens the model without a head.
BARE_NAMES = {
    r"^language_model\.model\.": "language_model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^model\.": "",
}
TRANSFORMERS_4 = __version__.startswith("4.")
HARMLESS = {"cache_position"}  # transformers passes it; nothing follows from it


class MossVideoPreTrainedModel(PreTrainedModel):
    """What the model with and without its head share: loading, first weights, checkpointing."""

    config_class = MossVideoConfig
    # transformers 4 would take a file of old names for one of the model without a head.
    base_model_prefix = "" if TRANSFORMERS_4 else "model"
    names_in_files = OLD_NAMES
    main_input_name = "input_ids"
    _no_split_modules = ("VisionLayer", "SelfLayer", "CrossLayer")
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    _tied_weights_keys = None

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """transformers' `from_pretrained`; also reads weights with the names of transformers 4."""
        kwargs.setdefault("key_mapping", cls.names_in_files)
        return super().from_pretrained(*args, **kwargs)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **kwargs: Any
    ) -> None:
        """transformers' own, always with `use_reentrant=False`: a layer gets the keys and values of
        frames in an object, and the reentrant form gives those no gradient."""
        function = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, function, **kwargs)

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


class MossVideoModel(MossVideoPreTrainedModel):
    """Vision tower, projector and decoder, under the names of the checkpoint."""

    tokens_type = CachedTokens
    names_in_files = BARE_NAMES if TRANSFORMERS_4 else OLD_NAMES
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012 - transformers 4 adds lists

    def __init__(self, config: MossVideoConfig):
        super().__init__(config)
        width = config.vision_config.vision_output_dim
        self.vision_model = VisionTower(config)
        self.patch_merger = None
        if config.pool_mode == "channel_fusion":
            stride = config.pool_stride
            self.patch_merger = nn.Conv2d(width, width, stride, stride=stride, bias=False)
        self.multi_modal_projector = nn.Linear(width, config.text_config.hidden_size)
        self.language_model = Decoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.language_model.embed_tokens = value

    def encode(self, pixels: Tensor, ratio_ids: Tensor, tiles: Tensor) -> Tensor:
        """Encodes frames to the states that the decoder attends `[N, T x P, H]`.

        pixels: normalized `[N, T, 3, h, w]`. Ratio ids are `[N]`, real tiles `[N, T]`.
        """
        states = self.vision_model(pixels, ratio_ids, tiles)
        config = self.config
        joined = join_states(states, config.pool_mode, config.pool_stride, self.patch_merger)
        return self.multi_modal_projector(joined).flatten(1, 2)

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
        states = self.encode(
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
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        marks_alone: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """One pass to the hidden states of the last layer, normed `[B, S, H]`.

        The arguments are those of `MossVideoForConditionalGeneration.forward`.
        """
        _check_arguments(kwargs)
        decoder, config = self.language_model, self.config
        is_image = self.is_image(input_ids, inputs_embeds)
        x = decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        again = self.training and any(layer.gradient_checkpointing for layer in decoder.layers)
        if use_cache is None:
            use_cache = not self.training and _by_config(config, "use_cache")
        past_key_values = cache_of_pass(past_key_values, use_cache, again)
        past = self.past(past_key_values)
        position_ids = token_positions(position_ids, attention_mask, past, x)
        if pixel_values is not None and cross_attention_states is not None:
            raise ValueError("give pixel_values or cross_attention_states, not both")
        if pixel_values is not None:
            cross_attention_states = self.get_image_features(
                pixel_values, aspect_ratio_ids, aspect_ratio_mask
            )
        new = None
        if cross_attention_states is not None:
            new = self._new_frames(
                is_image, position_ids, cross_attention_states, pixel_values, aspect_ratio_ids,
                aspect_ratio_mask,
            )  # fmt: skip
        elif not marks_alone:
            _check_marks(is_image, is_image.new_zeros(len(is_image), dtype=torch.long))
        states = _record(config, "output_hidden_states", output_hidden_states)
        weights = _record(config, "output_attentions", output_attentions)
        frames = self._frames(x, cross_attention_states, new, cross_attention_mask, past_key_values)
        if frames is not None:
            frames.weights = weights
        mask = token_mask(attention_mask, past, x.shape[1])
        tokens = self.tokens_type(past_key_values, mask, weights)
        x = decoder(x, position_ids, tokens, frames, states)
        out = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=None if states is None else tuple(states),
            attentions=None if weights is None else tuple(weights),
        )
        return out if returns_dict(config, return_dict) else out.to_tuple()

    def past(self, cache: Any) -> int:
        """The number of tokens in the cache."""
        cross = self.language_model.cross
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
        cross = self.language_model.cross
        kept = frames_in(cache, cross[0]) if cross else None
        old = None if kept is None else kept.seen
        if states is None and old is None:
            return None
        masked, shape = mask is not None, tuple(x.shape[:2])
        rows = [] if kept is None else [(kept.own, kept.slots)]
        rows += [] if new is None else [(new.marked, new.slots)]
        own, slots = (torch.cat(parts, dim=1) for parts in zip(*rows, strict=True))
        if mask is None:
            parts = [] if old is None else [old[:, None].expand(-1, shape[1], -1, -1)]
            mask = torch.cat(parts if new is None else [*parts, new.seen], dim=2)
        if masked:  # before the cache takes the new ones
            frame_masks = [
                one for one in (old, None if new is None else new.seen) if one is not None
            ]
            check_frame_mask(mask, (*shape, own.shape[1], frame_masks[0].shape[-1]))
        keys_values = self._keys_values(states, new, cache)
        mask = mask.bool()
        if cache is not None:
            for layer in cross:
                cache.layers[layer].keep(mask[:, -1], own, slots)
        if masked:  # padding frames are attended too, as transformers' Mllama does
            slots = torch.ones_like(slots)
        attend_all = self.config.tokens_before_first_frame == "attend_all"
        return AttendedFrames(keys_values, mask, own, slots if attend_all else None, x.dtype)

    def is_image(self, input_ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        """True for `<|image|>` `[B, S]`: of ids, or what is embedded as it is."""
        image = self.config.image_token_index
        if input_ids is not None:
            return input_ids == image
        if embeds is None:
            raise ValueError("give input_ids or inputs_embeds")
        mark = self.language_model.embed_tokens(torch.tensor([image], device=embeds.device))
        return (embeds == mark.to(embeds.device)).all(-1)

    def _new_frames(
        self,
        is_image: Tensor,
        position_ids: Tensor,
        states: Tensor,
        pixels: Tensor | None,
        ratio_ids: Tensor | None,
        tile_mask: Tensor | None,
    ) -> NewFrames:
        """Where frames with `states` `[B, F, T x P, H]` stand, and which token sees which tile.

        Raises:
            ValueError: a row has more or fewer `<|image|>` tokens than frames.
        """
        real = real_frames(pixels, ratio_ids, states)  # [B, F]
        _check_marks(is_image, real.sum(1))
        number = is_image.cumsum(1)[:, :, None]  # frames up to each token
        frames = torch.arange(1, real.shape[1] + 1, device=is_image.device)
        own = is_image[:, :, None] & (number == frames)  # [B, S, F]
        positions = (own * position_ids[:, :, None]).sum(1)
        ids = real.long() if ratio_ids is None else ratio_ids
        tiles = self._tiles(ids, tile_mask, states.shape[2] // self.config.tokens_per_frame)
        marked = own.any(1)
        slots = marked if ratio_ids is None else ratio_ids > 0
        visible = (number >= frames)[..., None] & tiles[:, None]  # [B, S, F, T]
        return NewFrames(positions, marked, slots, visible)

    def _keys_values(
        self, states: Tensor | None, new: NewFrames | None, cache: Any
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values of frames for each cross-attention layer, new frames appended to the
        cached ones."""
        decoder = self.language_model
        if states is None or new is None:
            layers = {i: cache.layers[i] for i in decoder.cross}
            return {i: (c.keys, c.values) for i, c in layers.items()}
        each = new.positions.repeat_interleave(states.shape[2], dim=1)  # [B, F x T x P]
        rotation = decoder.rotation(each, states.dtype)
        keys_values = {}
        for layer in decoder.cross:
            k, v = self._project(layer, states.flatten(1, 2), rotation)
            keys_values[layer] = (k, v) if cache is None else cache.update(k, v, layer)
            if cache is not None:
                hold_frames(cache, layer)
        return keys_values

    def _project(self, layer: int, states: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        return self.language_model.project(layer, states, rotation)


def _check_marks(is_image: Tensor, counts: Tensor) -> None:
    """Raises ValueError unless rows have as many `<|image|>` tokens as frames: `counts`."""
    marks = is_image.sum(1)
    if torch.compiler.is_compiling():  # no branch upon values there: checked when it runs
        torch._assert_async((marks == counts).all(), "one <|image|> token for each frame")
    elif not marks.equal(counts):
        raise ValueError(
            f"the rows have {marks.tolist()} <|image|> tokens, but {counts.tolist()} frames are "
            "given: one <|image|> for each frame (padding frames, after the others: "
            "aspect_ratio_ids 0)"
        )


def _check_arguments(kwargs: dict[str, Any]) -> None:
    """Raises ValueError for inputs and outputs that the model does not have."""
    arguments = {name for name, value in kwargs.items() if value is not None and value is not False}
    unknown = sorted(arguments - HARMLESS)
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: this model has no such input or output")


def returns_dict(config: MossVideoConfig, return_dict: bool | None) -> bool:
    """Whether outputs are wanted by name, not as a tuple."""
    return bool(config.return_dict if return_dict is None else return_dict)


def _by_config(config: MossVideoConfig, name: str) -> bool:
    """A setting that is on where neither the config nor its text part turns it off."""
    return all(getattr(part, name, None) is not False for part in (config, config.text_config))


def _record(config: MossVideoConfig, name: str, output_option: bool | None) -> list[Tensor] | None:
    """A list for an output that the caller asks for, or else the config; else None."""
    value = getattr(config, name, False) if output_option is None else output_option
    if value not in (True, False, None):
        raise ValueError(f"{name}={value!r}: must be true or false")
    return [] if value else None


# What save_pretrained writes can be opened by itself: it copies these files and names the class.
MossVideoModel.register_for_auto_class("AutoModel")

__all__ = ["MossVideoModel", "MossVideoPreTrainedModel"]
