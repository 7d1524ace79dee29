"""The arithmetic of KV blocks."""

from __future__ import annotations


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Return how many blocks of ``block_size`` tokens hold so many tokens."""
    return -(-num_tokens // block_size)
