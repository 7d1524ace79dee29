"""`design` chooses the batches that a profile measures. It knows nothing of tensors or clocks.

Batches are those that a server runs: decodes, prefill chunks and mixes of both.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import islice, product

from minserve.blocks import blocks_for
from minserve.engine.core import EngineCore
from minserve.engine.device.runner import model_runner
from minserve.planner.predict.eager import NO_MIXED, MixedLimit, is_eager
from minserve.planner.predict.perf_model import BatchShape

SHORTEST_CONTEXT = 16
SHORTEST_CHUNK = 16
MOST_CHUNKS = 8
# Shares of batches with prefill whose chunk stands behind a context, or is several prompts.
BEHIND_CONTEXT = 0.5
SEVERAL_PROMPTS = 0.15
# A decode's context lies within this share of its batch's mean.
CONTEXT_SPREAD = 0.5
KINDS = ("decodes", "chunks", "mix")
NUM_DIMENSIONS = 5
# Tokens before those that a draft model is timed with.
DRAFT_CONTEXT = 48


@dataclass(frozen=True, slots=True)
class ProfileBatch:
    """A batch to measure.

    Attributes:
        decodes: the number of tokens computed already, per decoding sequence.
        chunks: the numbers of tokens computed already and to run, per prefill chunk.
        graphs: whether the device has CUDA graphs of passes over decodes.
        mixed: the largest batches with a prefill for which it has some.
    """

    decodes: tuple[int, ...] = ()
    chunks: tuple[tuple[int, int], ...] = ()
    graphs: bool = False
    mixed: MixedLimit = NO_MIXED

    @property
    def runs(self) -> list[tuple[int, int]]:
        """The numbers of tokens computed already and to run, per sequence."""
        return [*((start, 1) for start in self.decodes), *self.chunks]

    @property
    def shape(self) -> BatchShape:
        """The batch's shape. Without graphs ``eager`` is 0, since all batches are eager then."""
        runs, num_decodes = self.runs, len(self.decodes)
        num_tokens = sum(num for _, num in runs)
        eager = self.graphs and is_eager(len(runs), num_decodes, num_tokens, self.mixed)
        return BatchShape.of(runs, eager=eager)


@dataclass(frozen=True, slots=True)
class CoreLimits:
    """The largest batches that a core can run.

    Attributes:
        token_budget, max_num_seqs: the most tokens and sequences of one batch.
        longest: the most tokens of a sequence.
        num_blocks, block_size: the size of the pool.
        graphs: whether passes over decodes are CUDA graphs.
        mixed: the largest batches with a prefill that are.
    """

    token_budget: int
    max_num_seqs: int
    longest: int
    num_blocks: int
    block_size: int
    graphs: bool = False
    mixed: MixedLimit = NO_MIXED

    @classmethod
    def of(cls, core: EngineCore) -> CoreLimits:
        pool, graphs = core.pool, model_runner(core.runner).graphs
        return cls(
            core.token_budget,
            core.max_num_seqs,
            min(core.max_model_len, pool.num_blocks * pool.block_size),
            pool.num_blocks,
            pool.block_size,
            graphs=graphs is not None,
            mixed=NO_MIXED if graphs is None else graphs.mixed,
        )

    def blocks(self, num_tokens: int) -> int:
        """Return the number of blocks for so many tokens of one sequence."""
        return blocks_for(num_tokens, self.block_size)

    def allow(self, batch: ProfileBatch) -> bool:
        ends = [start + num_tokens for start, num_tokens in batch.runs]
        return (
            min(batch.decodes, default=1) > 0
            and batch.shape.tokens <= self.token_budget
            and len(ends) <= self.max_num_seqs
            and max(ends) <= self.longest
            and sum(map(self.blocks, ends)) <= self.num_blocks
        )


def design(limits: CoreLimits, num_batches: int, seed: int) -> list[ProfileBatch]:
    """Return at most so many batches, all different, the simplest ones first.

    The others are decodes, prefill chunks and mixes in turn, log-uniform between short and
    the limits. Their points are the additive recurrence R_d (Roberts, "The unreasonable
    effectiveness of quasirandom sequences", 2018), so that any beginning of the list covers
    the space.
    """
    rng = random.Random(seed)
    offsets = {kind: [rng.random() for _ in range(NUM_DIMENSIONS)] for kind in KINDS}
    ratio = 1.0
    for _ in range(50):  # to the root of x^(d + 1) = x + 1
        ratio = (1 + ratio) ** (1 / (NUM_DIMENSIONS + 1))
    batches = _simplest(limits)
    for i, kind in product(range(num_batches), KINDS):
        u = [(offset + i * ratio ** -(d + 1)) % 1.0 for d, offset in enumerate(offsets[kind])]
        batches.append(_batch(limits, u, kind, rng))
    batches = [replace(batch, graphs=limits.graphs, mixed=limits.mixed) for batch in batches]
    different = dict.fromkeys(batch for batch in batches if limits.allow(batch))
    return list(islice(different, num_batches))


def _simplest(limits: CoreLimits) -> list[ProfileBatch]:
    """Return batches of few and short sequences, each with one feature changed to the next."""
    far = min(512, limits.longest // 2)
    return [
        ProfileBatch(decodes=(SHORTEST_CONTEXT,)),
        ProfileBatch(chunks=((0, 64),)),
        ProfileBatch(decodes=(SHORTEST_CONTEXT,) * 8),
        ProfileBatch(decodes=(far,)),
        ProfileBatch(chunks=((far, 32),)),
        ProfileBatch(chunks=((0, SHORTEST_CHUNK),)),
        ProfileBatch(decodes=(far,) * 4),
        ProfileBatch(chunks=((0, 128),)),
        ProfileBatch(decodes=(64,) * 4, chunks=((0, 32),)),
        ProfileBatch(decodes=(SHORTEST_CONTEXT,) * 16),
    ]


def _batch(limits: CoreLimits, u: list[float], kind: str, rng: random.Random) -> ProfileBatch:
    """Return the batch at a point of the unit cube."""
    chunks = () if kind == "decodes" else _chunks(limits, u, reserve=int(kind == "mix"))
    return ProfileBatch(() if kind == "chunks" else _decodes(limits, u, chunks, rng), chunks)


def _chunks(limits: CoreLimits, u: list[float], *, reserve: int) -> tuple[tuple[int, int], ...]:
    """Return a chunk behind a context, several prompts, or one.

    Args:
        reserve: the tokens and blocks to leave for decodes.
    """
    most = max(1, min(limits.token_budget, limits.longest) - reserve)
    num_tokens = _log_uniform(u[2], min(SHORTEST_CHUNK, most), most)
    room = min(limits.longest, (limits.num_blocks - reserve) * limits.block_size) - num_tokens
    if u[3] < BEHIND_CONTEXT and room > 0:
        shortest = min(SHORTEST_CONTEXT, room)
        return ((_log_uniform(u[3] / BEHIND_CONTEXT, shortest, room), num_tokens),)
    num_chunks = 1
    if u[4] < SEVERAL_PROMPTS:
        num_chunks = min(_log_uniform(u[4] / SEVERAL_PROMPTS, 2, MOST_CHUNKS), num_tokens)
    return tuple((0, len(range(i, num_tokens, num_chunks))) for i in range(num_chunks))


def _decodes(
    limits: CoreLimits, u: list[float], chunks: tuple[tuple[int, int], ...], rng: random.Random
) -> tuple[int, ...]:
    """Return decodes that fit beside the chunks; at least one."""
    free = limits.num_blocks - sum(limits.blocks(start + n) for start, n in chunks)
    seqs = limits.max_num_seqs - len(chunks)
    tokens = limits.token_budget - sum(n for _, n in chunks)
    num_seqs = _log_uniform(u[0], 1, max(1, min(seqs, tokens, free)))
    longest = max(1, min(limits.longest, free // num_seqs * limits.block_size) - 1)
    mean = _log_uniform(u[1], min(SHORTEST_CONTEXT, longest), longest)
    spread = (rng.uniform(1 - CONTEXT_SPREAD, 1 + CONTEXT_SPREAD) for _ in range(num_seqs))
    return tuple(max(1, min(longest, round(mean * factor))) for factor in spread)


def _log_uniform(u: float, low: int, high: int) -> int:
    return round(low * (high / low) ** u)
