"""The plan of the cross-attention against a dense boolean mask."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from moss_train.model.frame_plan import NEVER, FramePlan, plan_frames


def random_layout(rng: random.Random, longest: int, most: int, max_tiles: int) -> dict:
    """Rows of random length and frames; some have ends, padding frames and tiles."""
    lengths = [rng.randint(1, longest) for _ in range(rng.randint(1, 3))]
    ends = rng.random() < 0.5
    rows: list[int] = []
    start: list[int] = []
    stop: list[int] = []
    for row, length in enumerate(lengths):
        image_at = sorted(rng.randrange(length) for _ in range(rng.randint(0, most)))
        until = sorted(rng.randint(position + 1, length + 3) for position in image_at)
        padding = rng.randint(0, 2) if rng.random() < 0.3 else 0
        rows += [row] * (len(image_at) + padding)
        start += image_at + [NEVER] * padding
        stop += (until if ends else [NEVER] * len(image_at)) + [NEVER] * padding
    tiles = [rng.randint(1, max_tiles) for _ in rows]
    return {"lengths": lengths, "rows": rows, "start": start, "stop": stop, "tiles": tiles}


def plan(layout: dict, max_tiles: int, attend_all: bool, **options: Any) -> FramePlan:
    """plan_frames of a layout, five tokens of padding behind its packed rows."""
    start = torch.tensor(layout["start"], dtype=torch.long)
    return plan_frames(
        torch.tensor(layout["rows"], dtype=torch.long),
        start.clamp(max=0),
        layout["lengths"],
        sum(layout["lengths"]) + 5,
        visible_from=start,
        visible_until=torch.tensor(layout["stop"], dtype=torch.long),
        tiles=torch.tensor(layout["tiles"], dtype=torch.long),
        max_tiles=max_tiles,
        attend_all=attend_all,
        **options,
    )


def dense(layout: dict, max_tiles: int, attend_all: bool) -> tuple[Tensor, Tensor]:
    """What each packed token may see `[S, F, T]`, and whether it sees a frame `[S]`."""
    total = sum(layout["lengths"]) + 5
    allowed = torch.zeros(total, len(layout["rows"]), max_tiles, dtype=torch.bool)
    sees = torch.zeros(total, dtype=torch.bool)
    place = 0
    for row, length in enumerate(layout["lengths"]):
        mine = [f for f, of_row in enumerate(layout["rows"]) if of_row == row]
        for token in range(length):
            seen = [f for f in mine if layout["start"][f] <= token < layout["stop"][f]]
            for f in seen:
                allowed[place, f, : layout["tiles"][f]] = True
            if not seen and attend_all:
                allowed[place, mine] = True
            sees[place] = bool(seen)
            place += 1
    return allowed, sees


def spread(frames: FramePlan, max_tiles: int) -> Tensor:
    """The plan's blocks as a dense mask `[S, F, T]`."""
    out = torch.zeros(len(frames.sees), frames.count * max_tiles, dtype=torch.bool)
    done = 0
    for block in frames.blocks:
        assert block.start == done < block.stop, "blocks overlap or leave a token out"
        assert block.first < block.last, "a block without frames"
        done = block.stop
        part = torch.zeros(block.stop - block.start, out.shape[1], dtype=torch.bool)
        shown = part[:, block.first * max_tiles : block.last * max_tiles]
        shown.copy_(torch.ones_like(shown) if block.mask is None else block.mask == 0)
        out[frames.tokens[block.start : block.stop]] = part
    assert done == len(frames.tokens)
    return out.unflatten(1, (frames.count, max_tiles))


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
        assert torch.equal(spread(frames, max_tiles), allowed), layout
        assert torch.equal(frames.sees, sees), layout


def test_many_frames_in_a_long_row_make_several_blocks_that_are_still_exact():
    image_at = list(range(10, 610, 15))
    layout = {
        "lengths": [610],
        "rows": [0] * len(image_at),
        "start": image_at,
        "stop": [NEVER] * len(image_at),
        "tiles": [1] * len(image_at),
    }
    frames = plan(layout, 1, attend_all=False)
    # Whole spans of 15 tokens, until a block has MIN_BLOCK: nine of them.
    starts = [int(frames.tokens[block.start]) for block in frames.blocks]
    assert starts == [10, 145, 280, 415, 550]
    assert torch.equal(spread(frames, 1), dense(layout, 1, False)[0])


def realtime(tokens: int, frames: int) -> FramePlan:
    """A frame every tokens / frames tokens."""
    image_at = torch.arange(frames) * (tokens // frames)
    return plan_frames(torch.zeros(frames, dtype=torch.long), image_at, [tokens], tokens)


def test_a_block_computes_little_more_than_what_is_seen():
    seen = sum(token // 8 + 1 for token in range(2048))
    frames = realtime(2048, 256)
    assert frames.attended() == seen
    assert sum(block.pairs for block in frames.blocks) < 1.08 * seen


def test_tokens_after_the_last_frame_need_no_mask():
    image_at = torch.arange(256)
    frames = plan_frames(torch.zeros(256, dtype=torch.long), image_at, [2048], 2048)
    last = frames.blocks[-1]
    assert (last.start, last.stop, last.mask) == (255, 2048, None)


def test_short_rows_share_a_block():
    image_at = torch.tensor([1, 1, 1, 1])
    frames = plan_frames(torch.arange(4), image_at, [20, 20, 20, 20], 80)
    assert [(b.start, b.stop, b.first, b.last) for b in frames.blocks] == [(0, 76, 0, 4)]


def test_a_row_of_many_frames_shares_no_block_with_another():
    rows = torch.tensor([0] * 200 + [1] * 200)
    frames = plan_frames(rows, torch.zeros(400, dtype=torch.long), [100, 100], 200)
    assert [(b.start, b.stop, b.first, b.last) for b in frames.blocks] == [
        (0, 100, 0, 200),
        (100, 200, 200, 400),
    ]


def test_rows_without_frames_attend_none():
    frames = plan_frames(torch.tensor([1, 1]), torch.tensor([0, 2]), [4, 4], 8, attend_all=True)
    assert frames.tokens.tolist() == [4, 5, 6, 7]
    assert frames.sees.tolist() == [False] * 4 + [True] * 4


def test_frames_out_of_order_are_refused():
    with pytest.raises(ValueError, match="sequence 0 are not in the order"):
        plan_frames(torch.tensor([0, 0]), torch.tensor([3, 1]), [5], 5)
