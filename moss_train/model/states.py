"""The states of a stream's labels: silence, begin of speech, words; and what each state weighs.

The loss `state_balanced` is equation 2 of the MOSS-VL technical report (arXiv 2608.15045), focal
loss (Lin et al. 2017, arXiv 1708.02002) with the inverse frequency of a class: a label k of a state
has the weight

    a_k (1 - p)^gamma,    a_k = (n_silence + n_begin) / (2 n_k)

on its cross entropy -log p, with the numbers n of labels in the global batch; all other labels
weigh 1, and the sum is divided by the number of labels. There a token `<|response|>` begins an
answer; here its first word does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from data_pipeline.batch import IGNORED_LABEL

WORD, SILENCE, BEGIN = range(3)


def label_states(
    labels: Tensor, lengths: list[int], frame_positions: Tensor, silence_id: int
) -> Tensor:
    """The state of the label at each position of packed sequences, int64 `[T]`, on the host.

    BEGIN is a label that is not silence where the token before it, frames left out, is silence or
    has no label: it begins a turn. Only a stream has states, a sequence with a label of silence:
    chats and captions are WORD throughout, and so is what has no label.

    Args:
        labels: `[T]`, not shifted; padding follows the sequences of `lengths`.
        frame_positions: of the frames among the T tokens `[N]`.
    """
    total, count = len(labels), sum(lengths)
    silent = labels == silence_id
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    silences = torch.zeros(len(lengths), dtype=torch.int64)
    silences.index_add_(0, sequence, silent[:count].long())
    streams = torch.zeros(total, dtype=torch.bool)
    streams[:count] = (silences > 0)[sequence]

    at = torch.arange(total)
    spoken = at.index_fill(0, frame_positions, -1).cummax(0).values  # last token that is no frame
    before = torch.cat((spoken.new_full((1,), -1), spoken[:-1]))
    outside = torch.ones(total, dtype=torch.bool)
    outside[:count] = before[:count] < starts[sequence]
    previous = labels[before.clamp(min=0)].masked_fill(outside, IGNORED_LABEL)
    begins = (previous == silence_id) | (previous == IGNORED_LABEL)

    states = torch.full_like(labels, WORD)
    states[streams & begins & (labels != IGNORED_LABEL)] = BEGIN
    states[streams & silent] = SILENCE
    return states


def count_states(states: Tensor) -> Tensor:
    """Numbers of labels of SILENCE and of BEGIN among `[n]` states, int64 `[2]`."""
    return torch.bincount(states, minlength=BEGIN + 1)[SILENCE:]


def state_weights(counts: Tensor) -> Tensor:
    """a_k of WORD, SILENCE and BEGIN, fp32 `[3]`, from the numbers of the last two in the global
    batch, int64 `[2]`. A state without a label weighs nothing anywhere."""
    inverse = counts.sum() / (2.0 * counts.clamp(min=1))
    return torch.cat((inverse.new_ones(1), inverse.float()))
