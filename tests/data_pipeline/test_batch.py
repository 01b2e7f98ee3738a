from __future__ import annotations

import pytest
import torch

from data_pipeline.batch import EncodedSample, Unlearned, collate


def _sample(key: str, length: int, positions: list[int]) -> EncodedSample:
    frames = len(positions)
    return EncodedSample(
        key=key,
        tokens=torch.arange(1, length + 1),
        labels=torch.arange(101, length + 101),
        frames=torch.full((frames, 2, 3, 4, 4), length, dtype=torch.uint8),
        frame_positions=torch.tensor(positions, dtype=torch.int64),
        aspect_ratio_ids=torch.ones(frames, dtype=torch.int64),
        unlearned=Unlearned(int(length == 4), 10 * length, length, 1),
    )


def test_rows_are_padded_right_and_frames_are_listed_row_after_row() -> None:
    batch = collate([_sample("a", 2, [1]), _sample("b", 3, []), _sample("c", 4, [0, 2])], 9)
    assert batch.tokens.tolist() == [[1, 2, 9, 9], [1, 2, 3, 9], [1, 2, 3, 4]]
    assert batch.labels.tolist() == [
        [101, 102, -100, -100],
        [101, 102, 103, -100],
        [101, 102, 103, 104],
    ]
    assert batch.frames.shape == (3, 2, 3, 4, 4)
    assert batch.frames.dtype == torch.uint8
    assert batch.frames[:, 0, 0, 0, 0].tolist() == [2, 4, 4]
    assert batch.frame_rows.tolist() == [0, 2, 2]
    assert batch.frame_positions.tolist() == [1, 0, 2]
    assert batch.keys == ["a", "b", "c"]
    assert batch.unlearned == Unlearned(
        truncated_samples=1, truncated_labels=90, turns=9, masked_turns=3
    )


def test_a_batch_of_text_alone_has_no_frames() -> None:
    batch = collate([_sample("a", 2, [])], 0)
    assert batch.frames.shape == (0, 2, 3, 4, 4)
    assert batch.frame_rows.tolist() == []


def test_no_samples_are_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        collate([], 0)
