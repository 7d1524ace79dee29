"""Pieces of decodes: every token once, all programs the same work, whatever the lengths."""

from __future__ import annotations

import random

import pytest
import torch
from decode_pieces import pieces_of

from minserve.kernels.triton.decode_plan import (
    FEW_PIECES_SPLIT,
    LEAST_SPLIT,
    UNSPLIT,
    DecodePlan,
    plan_decodes,
)

LLAMA_3_8B, OPT_6_7B, ONE_KV_HEAD = (32, 8, 128), (32, 32, 128), (8, 1, 64)
PROGRAMS = 528  # of an H100 at a time
KNOWN = pytest.mark.parametrize("lengths_known", [False, True], ids=["in a graph", "known"])
RANDOM = random.Random(0)
BATCHES = {
    "one long among short ones": [500] * 100 + [100_000] + [500] * 27,
    "a few long ones": [300, 40_000, 20, 30_000, 0, 700, 12_345, 1],
    "any lengths": [RANDOM.randrange(1, 9000) for _ in range(140)],
    "padding": [2048, 0, 0, 0],
    "nothing but padding": [0, 0],
    "one": [70_000],
    "short ones": [UNSPLIT] * 5,
}


def plan(
    lengths: list[int],
    heads: tuple[int, int, int],
    device: torch.device,
    *,
    lengths_known: bool,
    queries: int = 1,
) -> DecodePlan:
    num_heads, num_kv_heads, head_dim = heads
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + min(queries, length))
    return plan_decodes(
        torch.tensor(starts, device=device), torch.tensor(lengths, device=device),
        torch.zeros(len(lengths), 1, device=device), most_queries=queries,
        longest=max(lengths) if lengths_known else 131_072,
        total=sum(lengths) if lengths_known else None, num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=torch.float16, num_programs=PROGRAMS,
    )  # fmt: skip


@KNOWN
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("heads", [LLAMA_3_8B, OPT_6_7B, ONE_KV_HEAD], ids=str)
def test_every_token_is_in_one_piece(
    batch: str, heads: tuple[int, int, int], lengths_known: bool, device: torch.device
) -> None:
    lengths = BATCHES[batch]
    made = plan(lengths, heads, device, lengths_known=lengths_known, queries=3)
    found = pieces_of(made)
    assert set(found) == {seq for seq, length in enumerate(lengths) if length}
    for seq, pieces in found.items():
        ends = [0, *(end for _, end in pieces)]
        assert [begin for begin, _ in pieces] == ends[:-1]
        assert ends[-1] == lengths[seq]
        assert all(end % made.tile.block_n == 0 for end in ends[:-1])
        if len(pieces) > 1:
            # Pieces of a sequence have the same length, the last one aside.
            assert pieces[0][1] > FEW_PIECES_SPLIT / 2
    for row in made.pieces.tolist():
        seq, start, num_queries, length, begin, end, _, num_splits = row
        if begin < end:
            assert (start, num_queries) == (sum(min(3, n) for n in lengths[:seq]), min(3, length))
            assert (length, num_splits) == (lengths[seq], len(found[seq]))
    with_partials = [
        i for i, row in enumerate(made.pieces.tolist()) if row[4] < row[5] and row[7] > 1
    ]
    assert len(with_partials) <= made.partial.shape[0]
    assert with_partials == list(range(len(with_partials))), "split sequences come first"


def most_work(made: DecodePlan, lengths: list[int], heads: tuple[int, int, int]) -> float:
    """The tokens of the program with most work, over those of the mean of all programs.

    Pieces go to programs in their order, each to the one that is free first.
    """
    work = [0] * PROGRAMS
    for row in made.pieces.tolist():
        for _ in range(heads[1]):
            first = min(range(PROGRAMS), key=work.__getitem__) if 0 not in work else work.index(0)
            work[first] += row[5] - row[4]
    return max(work) / (sum(lengths) * heads[1] / PROGRAMS)


@KNOWN
@pytest.mark.parametrize("heads", [LLAMA_3_8B, OPT_6_7B], ids=str)
@pytest.mark.parametrize(
    ("batch", "most"),
    [("one long among short ones", 1.15), ("any lengths", 1.35), ("a few long ones", 1.1)],
)
def test_no_program_has_much_more_work_than_the_others(
    batch: str, most: float, heads: tuple[int, int, int], lengths_known: bool, device: torch.device
) -> None:
    lengths = BATCHES[batch]
    made = plan(lengths, heads, device, lengths_known=lengths_known)
    assert most_work(made, lengths, heads) <= most


@KNOWN
def test_one_sequence_is_split_over_the_device(lengths_known: bool, device: torch.device) -> None:
    made = plan([2048], LLAMA_3_8B, device, lengths_known=lengths_known)
    assert len(pieces_of(made)[0]) == 2048 // LEAST_SPLIT
    made = plan([100_000], LLAMA_3_8B, device, lengths_known=lengths_known)
    assert len(pieces_of(made)[0]) * 8 > 0.9 * PROGRAMS


@KNOWN
@pytest.mark.parametrize(
    ("lengths", "queries", "shortest"),
    [([512], 1, FEW_PIECES_SPLIT), ([512] * 8, 1, LEAST_SPLIT), ([512], 5, LEAST_SPLIT)],
    ids=["one short sequence", "several", "many rows to merge"],
)
def test_pieces_are_shorter_where_all_are_merged_at_once(
    lengths: list[int], queries: int, shortest: int, lengths_known: bool, device: torch.device
) -> None:
    made = plan(lengths, LLAMA_3_8B, device, lengths_known=lengths_known, queries=queries)
    for pieces in pieces_of(made).values():
        assert [end - begin for begin, end in pieces] == [shortest] * (512 // shortest)


@pytest.mark.parametrize(("num_seqs", "length"), [(64, 2048), (256, 512), (1, UNSPLIT)])
def test_a_batch_that_fills_the_device_is_not_split(
    num_seqs: int, length: int, device: torch.device
) -> None:
    made = plan([length] * num_seqs, LLAMA_3_8B, device, lengths_known=True)
    assert all(len(pieces) == 1 for pieces in pieces_of(made).values())


def test_a_batch_too_short_to_be_split_takes_no_memory_for_it(device: torch.device) -> None:
    made = plan([UNSPLIT] * 5, LLAMA_3_8B, device, lengths_known=True)
    assert made.pieces.shape[0] == 5
    assert made.partial.numel() == made.lse.numel() == made.arrived.numel() == 0
