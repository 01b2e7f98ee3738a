"""Lets `generate` look up scores of tokens that the model reads and never says, as `<|image|>`.

The embedding has rows for them, the head has none: what transformers looks up by the prompt's ids
would be out of range. A copy of this file is in every exported folder.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as known
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from .decoder_moss_video import READ_ONLY_ROWS

BY_ID = (
    known.RepetitionPenaltyLogitsProcessor,
    known.EncoderRepetitionPenaltyLogitsProcessor,
    known.NoRepeatNGramLogitsProcessor,
    known.EncoderNoRepeatNGramLogitsProcessor,
)


class WithReadOnlyTokens(LogitsProcessor):
    """A processor of scores `[B, V]` that finds one for every token of the prompt, which is -inf
    where it is never said."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        processed: Tensor = self.processor(input_ids, _with_read_only(scores))
        return processed[:, : scores.shape[1]]


class NeverSaid(LogitsProcessor):
    """Scores `[B, V + READ_ONLY_ROWS]` of `[B, V]`: -inf for read-only tokens and `image`."""

    def __init__(self, image: int):
        self.image = image

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        made = _with_read_only(scores)
        made[:, self.image] = -torch.inf
        return made


def find_read_only_tokens(processors: Any) -> LogitsProcessorList:
    """The processors of a `generate`, of which those that look up scores by ids find them."""
    return LogitsProcessorList(
        WithReadOnlyTokens(one) if isinstance(one, BY_ID) else one for one in processors
    )


def leave_images_out_of_candidates(generator: Any, image: int) -> Any:
    """A generator of candidates that continues the text with no `image` token of the prompt, in
    whose place there would have to be a frame."""
    if isinstance(generator, PromptLookupCandidateGenerator):
        processors = generator.logits_processor or ()
        generator.logits_processor = LogitsProcessorList([*processors, NeverSaid(image)])
    return generator


def _with_read_only(scores: Tensor) -> Tensor:
    return F.pad(scores, (0, READ_ONLY_ROWS), value=-torch.inf)
