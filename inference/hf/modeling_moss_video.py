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
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from .attended_moss_video import frame_mask_of_pass, leave_out_cached_frames
from .configuration_moss_video import MossVideoConfig
from .decoder_moss_video import READ_ONLY_ROWS
from .logits_moss_video import find_read_only_tokens, leave_images_out_of_candidates
from .model_moss_video import (
    TRANSFORMERS_4,
    MossVideoModel,
    MossVideoPreTrainedModel,
    returns_dict,
)

# Of a local folder transformers 4 copies what this file itself imports, and nothing further.
from .vision_moss_video import VisionTower  # noqa: F401

IGNORED_LABEL = -100  # no loss there
AFTER_FIRST = "after_first_pass"  # told by transformers 5 alone


class MossVideoForConditionalGeneration(MossVideoPreTrainedModel, GenerationMixin):
    """The model with its output head."""

    def __init__(self, config: MossVideoConfig):
        super().__init__(config)
        text = config.text_config
        self.model = MossVideoModel(config)
        self.lm_head: nn.Module = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

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

    def get_image_features(self, *args: Any, **kwargs: Any) -> Tensor:
        """`MossVideoModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

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
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
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
            inputs_embeds: in place of embedded `input_ids`. Without these an embedding like
                `<|image|>`'s is one.
            labels: `[B, S]`, not shifted; -100 and `<|image|>` are ignored, silence weighs
                `silence_weight`. The sum is divided by `num_items_in_batch`, or their count.
            use_cache: None: where nothing is trained, unless the config turns it off.
            logits_to_keep: logits of so many last positions only, or of these positions; the loss
                is of all.
            return_dict: False: a tuple of what is not None.
            kwargs: `shift_labels`: labels of the next token at each position, in place of `labels`;
                no argument by name, for transformers' Trainer wants all that are called labels.
                `output_hidden_states`: the input of each layer that runs, and the last normed
                output; `output_attentions`: what each layer that runs attends, `[B, heads, S, L]`;
                None: as the config says. `marks_alone`: without frames, an `<|image|>` is a token
                like others: where the model has said it itself, or is to be shown nothing.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        labelled = labels is not None or shift_labels is not None
        if use_cache is None and labelled:
            use_cache = False
        out = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            aspect_ratio_mask=aspect_ratio_mask,
            aspect_ratio_ids=aspect_ratio_ids,
            attention_mask=attention_mask,
            cross_attention_mask=cross_attention_mask,
            cross_attention_states=cross_attention_states,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        states, keep, loss = out.last_hidden_state, logits_to_keep, None
        where = slice(-keep, None) if isinstance(keep, int) else keep
        if labelled:
            logits = self.lm_head(states)
            loss = self._loss(logits, labels, shift_labels, num_items_in_batch)
            logits = logits[:, where]
        else:
            logits = self.lm_head(states[:, where])
        made = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
        return made if returns_dict(self.config, return_dict) else made.to_tuple()

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor | None,
        shifted: Tensor | None,
        count: Tensor | int | None,
    ) -> Tensor:
        config = self.config
        if shifted is None:
            assert labels is not None
            shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
        targets = shifted.masked_fill(shifted == config.image_token_index, IGNORED_LABEL)
        targets = targets.flatten().to(logits.device)
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(),
            targets,
            ignore_index=IGNORED_LABEL,
            reduction="none",
        )
        if config.silence_token_id is not None:
            silent = targets == config.silence_token_id
            losses = torch.where(silent, losses * config.silence_weight, losses)
        labelled = (targets != IGNORED_LABEL).sum().clamp(min=1)
        count = labelled if count is None else count
        return losses.sum() / (count.to(losses.device) if isinstance(count, Tensor) else count)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        is_first_iteration: bool | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Frames go in once: later passes find them in the cache, and so does a further turn that
        begins with the cache of the last one. transformers looks for the name `inputs_embeds`."""
        first = not kwargs.pop(AFTER_FIRST, False) if TRANSFORMERS_4 else bool(is_first_iteration)
        past = self.model.past(kwargs.get("past_key_values"))
        position_ids = None if TRANSFORMERS_4 else kwargs.get("position_ids")  # 4 goes by its cache
        if first and past > 0 and _holds_cached(position_ids, input_ids, past):
            kwargs["next_sequence_length"] = input_ids.shape[1] - past
        for name in ("tokenizer", "assistant_tokenizer"):  # of generate: what stop_strings need
            kwargs.pop(name, None)
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            is_first_iteration=bool(is_first_iteration),
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        is_image = self.model.is_image(inputs["input_ids"], inputs.get("inputs_embeds"))
        if past > 0:
            leave_out_cached_frames(inputs, is_image, first)
        mask = inputs.get("cross_attention_mask")
        if mask is not None:
            rows = frame_mask_of_pass(mask, past, is_image.shape[1]) if first or not past else None
            inputs["cross_attention_mask"] = rows
        inputs["marks_alone"] = not first
        return inputs

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        made: dict[str, Any] = super()._update_model_kwargs_for_generation(*args, **kwargs)
        if TRANSFORMERS_4:
            made[AFTER_FIRST] = True
            positions = made.get("position_ids")
            if positions is not None:  # given to generate: 5 continues them itself
                new = torch.arange(1, kwargs.get("num_new_tokens", 1) + 1, device=positions.device)
                made["position_ids"] = torch.cat((positions, positions[:, -1:] + new), dim=1)
        return made

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        return find_read_only_tokens(super()._get_logits_processor(*args, **kwargs))

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        made = super()._get_candidate_generator(*args, **kwargs)
        return leave_images_out_of_candidates(made, self.config.image_token_index)


def _holds_cached(positions: Tensor | None, ids: Tensor, past: int) -> bool:
    """Whether the first pass of a turn would repeat the `past` tokens of its cache, as transformers
    5 lets one with candidates do."""
    if positions is None or positions.shape[-1] != ids.shape[1]:
        return False
    return int(positions[0, 0]) < past


# What save_pretrained writes can be opened by itself: it copies these files and names the class.
MossVideoForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["MossVideoForConditionalGeneration"]
