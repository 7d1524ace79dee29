"""`text_table`: columns of text, for terminals and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tabulate import tabulate


def text_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    left: int = 1,
    markdown: bool = False,
) -> str:
    """Return a table as lines of text, without a line break at the end.

    Args:
        rows: the cells, which are shown as ``str`` gives them; ``None`` becomes a dash.
        left: so many columns, from the first one, are aligned to the left; the others hold numbers.
        markdown: False for a terminal.
    """
    cells = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    sides = ["left" if column < left else "right" for column in range(len(headings))]
    text = tabulate(
        cells,
        headings,
        tablefmt="github" if markdown else "plain",
        colalign=sides if cells else None,
        disable_numparse=True,
    )
    return "\n".join(line.rstrip() for line in text.splitlines())
