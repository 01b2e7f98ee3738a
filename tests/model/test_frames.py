"""The plan of the cross-attention against a dense boolean mask."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from moss_train.model.frames import NEVER, FrameBatch, plan_frames


def random_layout(rng: random.Random, longest: int, most: int, max_tiles: int) -> dict:
    """Rows of random length, with random marks and, for some, ends, padding frames and tiles."""
    lengths = [rng.randint(1, longest) for _ in range(rng.randint(1, 3))]
    ends = rng.random() < 0.5
    rows: list[int] = []
    start: list[int] = []
    stop: list[int] = []
    for row, length in enumerate(lengths):
        marks = sorted(rng.randrange(length) for _ in range(rng.randint(0, most)))
        until = sorted(rng.randint(mark + 1, length + 3) for mark in marks)
        padding = rng.randint(0, 2) if rng.random() < 0.3 else 0
        rows += [row] * (len(marks) + padding)
        start += marks + [NEVER] * padding
        stop += (until if ends else [NEVER] * len(marks)) + [NEVER] * padding
    tiles = [rng.randint(1, max_tiles) for _ in rows]
    return {"lengths": lengths, "rows": rows, "start": start, "stop": stop, "tiles": tiles}


def plan(layout: dict, max_tiles: int, attend_all: bool) -> FrameBatch:
    """plan_frames of a layout, the rows padded by five tokens."""
    start = torch.tensor(layout["start"], dtype=torch.long)
    return plan_frames(
        torch.tensor(layout["rows"], dtype=torch.long),
        start.clamp(max=0),
        layout["lengths"],
        max(layout["lengths"]) + 5,
        visible_from=start,
        visible_until=torch.tensor(layout["stop"], dtype=torch.long),
        tiles=torch.tensor(layout["tiles"], dtype=torch.long),
        max_tiles=max_tiles,
        attend_all=attend_all,
    )


def dense(layout: dict, max_tiles: int, attend_all: bool) -> tuple[Tensor, Tensor]:
    """What each token may see `[B, S, F, T]`, and whether it sees a frame `[S, B]`."""
    length, batch = max(layout["lengths"]) + 5, len(layout["lengths"])
    allowed = torch.zeros(batch, length, len(layout["rows"]), max_tiles, dtype=torch.bool)
    sees = torch.zeros(length, batch, dtype=torch.bool)
    for row in range(batch):
        mine = [f for f, of_row in enumerate(layout["rows"]) if of_row == row]
        for token in range(layout["lengths"][row]):
            seen = [f for f in mine if layout["start"][f] <= token < layout["stop"][f]]
            for f in seen:
                allowed[row, token, f, : layout["tiles"][f]] = True
            if not seen and attend_all:
                allowed[row, token, mine] = True
            sees[token, row] = bool(seen)
    return allowed, sees


def spread(frames: FrameBatch, length: int, max_tiles: int) -> Tensor:
    """The plan's blocks as a dense mask `[B, S, F, T]`."""
    out = torch.zeros(len(frames.rows), length, frames.count * max_tiles, dtype=torch.bool)
    for row, blocks in enumerate(frames.rows):
        done = 0
        for block in blocks:
            assert done <= block.start < block.stop, "blocks overlap"
            assert block.first < block.last, "a block without frames"
            done = block.stop
            part = out[row, block.start : block.stop]
            part = part[:, block.first * max_tiles : block.last * max_tiles]
            part.copy_(torch.ones_like(part) if block.mask is None else block.mask)
    return out.unflatten(2, (frames.count, max_tiles))


@pytest.mark.parametrize("attend_all", [False, True])
@pytest.mark.parametrize(
    ("longest", "most", "max_tiles", "tries"), [(12, 4, 1, 150), (24, 6, 3, 100), (600, 40, 2, 4)]
)
def test_blocks_allow_exactly_what_the_dense_mask_allows(
    longest, most, max_tiles, tries, attend_all
):
    rng = random.Random(longest)
    for _ in range(tries):
        layout = random_layout(rng, longest, most, max_tiles)
        if not layout["rows"]:
            continue
        frames = plan(layout, max_tiles, attend_all)
        allowed, sees = dense(layout, max_tiles, attend_all)
        assert torch.equal(spread(frames, allowed.shape[1], max_tiles), allowed), layout
        assert torch.equal(frames.sees, sees), layout


def test_many_frames_in_a_long_row_make_several_blocks_that_are_still_exact():
    marks = list(range(10, 610, 15))
    layout = {
        "lengths": [610],
        "rows": [0] * len(marks),
        "start": marks,
        "stop": [NEVER] * len(marks),
        "tiles": [1] * len(marks),
    }
    frames = plan(layout, 1, attend_all=False)
    # Whole spans of 15 tokens, until a block has MIN_BLOCK: nine of them.
    assert [block.start for block in frames.rows[0]] == [10, 145, 280, 415, 550]
    assert torch.equal(spread(frames, 615, 1), dense(layout, 1, False)[0])


def realtime(tokens: int, frames: int) -> FrameBatch:
    """A mark every tokens / frames tokens."""
    marks = torch.arange(frames) * (tokens // frames)
    return plan_frames(torch.zeros(frames, dtype=torch.long), marks, [tokens], tokens)


def test_a_block_computes_little_more_than_what_is_seen():
    seen = sum(token // 8 + 1 for token in range(2048))
    assert realtime(2048, 256).attended() < 1.08 * seen


def test_tokens_after_the_last_frame_need_no_mask():
    marks = torch.arange(256)
    frames = plan_frames(torch.zeros(256, dtype=torch.long), marks, [2048], 2048)
    last = frames.rows[0][-1]
    assert (last.start, last.stop, last.mask) == (255, 2048, None)


def test_rows_without_frames_have_no_blocks():
    frames = plan_frames(torch.tensor([1, 1]), torch.tensor([0, 2]), [4, 4], 4, attend_all=True)
    assert frames.rows[0] == []
    assert not frames.sees[:, 0].any()


def test_frames_out_of_order_are_refused():
    with pytest.raises(ValueError, match="row 0 are not in the order"):
        plan_frames(torch.tensor([0, 0]), torch.tensor([3, 1]), [5], 5)
