"""Tables as plain text, for what reports print."""

from __future__ import annotations

from collections.abc import Sequence


def table_lines(rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Return a line for each row, with columns below each other.

    Args:
        rows: cells; all rows have equally many.
        left: the column that is aligned to the left; all others are aligned to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column == left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
