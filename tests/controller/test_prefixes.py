"""Who holds which prefix, as far as one can tell from outside."""

from __future__ import annotations

from minserve.controller.prefixes import CHUNK, PrefixMap, chunks_of

TOKENS = list(range(4 * CHUNK))


def note(prefixes: PrefixMap, replica: int, token_ids: list[int], salt: str) -> None:
    prefixes.note(replica, chunks_of(token_ids, salt))


def cached(prefixes: PrefixMap, token_ids: list[int], salt: str) -> dict[int, int]:
    return prefixes.cached(chunks_of(token_ids, salt), len(token_ids))


def test_the_longest_prefix_of_each_replica_is_found() -> None:
    prefixes = PrefixMap()
    note(prefixes, 0, TOKENS, "")
    note(prefixes, 1, TOKENS[: 2 * CHUNK + 5], "")
    assert cached(prefixes, [*TOKENS, 7], "") == {0: 4 * CHUNK, 1: 2 * CHUNK}


def test_the_last_token_is_never_cached_since_it_must_run() -> None:
    prefixes = PrefixMap()
    note(prefixes, 0, TOKENS, "")
    assert cached(prefixes, TOKENS, "") == {0: 3 * CHUNK}


def test_another_salt_or_beginning_shares_nothing() -> None:
    prefixes = PrefixMap()
    note(prefixes, 0, TOKENS, "a")
    assert cached(prefixes, TOKENS, "b") == {}
    assert cached(prefixes, [1, *TOKENS], "a") == {}


def test_a_lost_replica_holds_nothing() -> None:
    prefixes = PrefixMap()
    note(prefixes, 0, TOKENS, "")
    note(prefixes, 1, TOKENS, "")
    prefixes.forget(0)
    assert set(cached(prefixes, TOKENS, "")) == {1}


def test_the_longest_unused_is_forgotten_first() -> None:
    prefixes = PrefixMap(most=4)
    note(prefixes, 0, TOKENS, "")
    note(prefixes, 0, TOKENS[:CHUNK], "other")
    assert cached(prefixes, [*TOKENS[:CHUNK], 1], "other") == {0: CHUNK}
    assert cached(prefixes, TOKENS, "") == {}
