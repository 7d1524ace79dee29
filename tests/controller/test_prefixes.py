"""Who holds which prefix, as far as one can tell from outside."""

from __future__ import annotations

from minserve.controller.prefixes import CHUNK, PrefixMap

TOKENS = list(range(4 * CHUNK))


def test_the_longest_prefix_of_each_replica_is_found() -> None:
    prefixes = PrefixMap()
    prefixes.note(0, TOKENS, "")
    prefixes.note(1, TOKENS[: 2 * CHUNK + 5], "")
    assert prefixes.cached([*TOKENS, 7], "") == {0: 4 * CHUNK, 1: 2 * CHUNK}


def test_the_last_token_is_never_cached_since_it_must_run() -> None:
    prefixes = PrefixMap()
    prefixes.note(0, TOKENS, "")
    assert prefixes.cached(TOKENS, "") == {0: 3 * CHUNK}


def test_another_salt_or_beginning_shares_nothing() -> None:
    prefixes = PrefixMap()
    prefixes.note(0, TOKENS, "a")
    assert prefixes.cached(TOKENS, "b") == {}
    assert prefixes.cached([1, *TOKENS], "a") == {}


def test_a_lost_replica_holds_nothing() -> None:
    prefixes = PrefixMap()
    prefixes.note(0, TOKENS, "")
    prefixes.note(1, TOKENS, "")
    prefixes.forget(0)
    assert set(prefixes.cached(TOKENS, "")) == {1}


def test_the_longest_unused_is_forgotten_first() -> None:
    prefixes = PrefixMap(most=4)
    prefixes.note(0, TOKENS, "")
    prefixes.note(0, TOKENS[:CHUNK], "other")
    assert prefixes.cached([*TOKENS[:CHUNK], 1], "other") == {0: CHUNK}
    assert prefixes.cached(TOKENS, "") == {}
