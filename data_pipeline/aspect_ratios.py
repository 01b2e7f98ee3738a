"""The grids of tiles that a frame can be cut into, and their ids."""

from __future__ import annotations

from functools import lru_cache


@lru_cache
def supported_aspect_ratios(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All grids of at most `max_tiles` tiles as (tiles high, tiles wide).

    The aspect ratio id of a grid is its 1-based place in this list, as in Llama-3.2-Vision; id 0
    stands for no frame.
    """
    sides = range(1, max_tiles + 1)
    return tuple((high, wide) for high in sides for wide in sides if high * wide <= max_tiles)
