"""Sequences that come and go in a block pool, as if a model computed them."""

from __future__ import annotations

from itertools import count

from minserve.engine.block_pool import BlockPool
from minserve.request import Request, Sequence
from minserve.sampling_params import SamplingParams

BLOCK = 4
_ids = count()


def make_seq(tokens, *, salt="", prompt_logprobs=None, arrival_s=0.0) -> Sequence:
    request = Request(
        request_id=f"r{next(_ids)}",
        prompt_token_ids=tuple(tokens),
        params=SamplingParams(max_tokens=1000, prompt_logprobs=prompt_logprobs),
        seed=0,
        arrival_s=arrival_s,
        cache_salt=salt,
    )
    return Sequence(request)


def start(pool: BlockPool, seq: Sequence) -> int:
    """Attach its cached prefix and compute all of its tokens."""
    cached = pool.attach(seq)
    seq.num_computed_tokens = cached
    compute(pool, seq, seq.num_tokens - cached)
    return cached


def compute(pool: BlockPool, seq: Sequence, num_tokens: int) -> None:
    pool.grow(seq, num_tokens)
    seq.num_computed_tokens += num_tokens
    pool.commit(seq)


def stop(pool: BlockPool, seq: Sequence) -> None:
    pool.release(seq)
    seq.num_computed_tokens = 0
