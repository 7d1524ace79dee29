"""The pieces of a plan of decodes, read back."""

from __future__ import annotations

from minserve.kernels.triton.decode_plan import DecodePlan


def pieces_of(plan: DecodePlan) -> dict[int, list[tuple[int, int]]]:
    """Return the pieces [begin, end) of each sequence; those of one lie side by side, in order."""
    found: dict[int, list[tuple[int, int]]] = {}
    rows = [row for row in plan.pieces.tolist() if row[4] < row[5]]
    for place, (seq, _, _, _, begin, end, split, num_splits) in enumerate(rows):
        pieces = found.setdefault(seq, [])
        assert split == len(pieces) < num_splits
        assert rows[place - split][0] == rows[place - split + num_splits - 1][0] == seq
        pieces.append((begin, end))
    return found
