"""Tables of text: rows of cells, the first row above the others and the first column on the left."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """For a terminal: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join((first.ljust(widths[0]), *map(str.rjust, cells, widths[1:]))).rstrip() for first, *cells in rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """For a page."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"| {' | '.join(['---'] * len(rows[0]))} |", *lines[1:]])
