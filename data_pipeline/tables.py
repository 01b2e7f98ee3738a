"""Tables as text: columns lined up for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(
    rows: Sequence[Sequence[str]], align: str = "lr", *, rule: bool = False, max_width: int = 0
) -> str:
    """The rows, the first of which is the header, as lines of text.

    Args:
        align: `l` (left) or `r` (right) for each column; the last letter holds for all that follow.
        rule: a line of dashes under the header.
        max_width: characters after which a cell of the rows below the header is cut off (0: never).
    """
    rows = [rows[0], *([_cut(cell, max_width) for cell in row] for row in rows[1:])]
    columns = len(rows[0])
    align = align.ljust(columns, align[-1])
    widths = [max(len(row[column]) for row in rows) for column in range(columns)]
    lines = [
        "  ".join(
            cell.ljust(width) if side == "l" else cell.rjust(width)
            for cell, side, width in zip(row, align[:columns], widths, strict=True)
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]] if rule else lines)


def _cut(cell: str, width: int) -> str:
    return cell if not width or len(cell) <= width else f"{cell[: width - 1]}…"
