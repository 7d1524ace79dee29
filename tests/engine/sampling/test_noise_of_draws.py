"""The generator: known answers, uniform numbers along every argument, independent streams."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from sampling_reference import chi_square, chi_square_limit, make_seq, splitmix64

from minserve.engine.sampling.noise import exponentials, philox, to_keys, uniforms, word, words
from minserve.engine.sampling.rows import SamplingRow

MASK64 = 2**64 - 1
CPU = torch.device("cpu")


def keys_of(*words: int) -> torch.Tensor:
    return to_keys(np.array(words, dtype=np.uint64), CPU)


def test_philox_gives_the_known_answers_of_random123() -> None:
    assert philox((0, 0), 0) == (0xCA00A0459843D731, 0x66C24222C9A845B5)
    assert philox((MASK64, MASK64), MASK64) == (0x65B021D60CD8310F, 0x4D02F3222F86DF20)


@pytest.mark.parametrize(
    "draw",
    [
        lambda i: word(7, 0, i),
        lambda i: word(i, 0, 0),
        lambda i: word(-i, 0, 3),
        lambda i: word(7, i, 5),
        lambda i: word(7, 0, 5, stream=i),
    ],
    ids=["position", "seed", "negative seed", "index", "stream"],
)
def test_words_are_uniform_along_every_argument(draw: Callable[[int], int]) -> None:
    draws = 10_000
    check_uniform(uniforms(np.array([draw(i) for i in range(draws)], dtype=np.uint64)).tolist())


def check_uniform(values: list[float], bins: int = 100) -> None:
    """Numbers, and pairs of neighbours, fill the unit interval and square evenly."""
    draws = len(values)
    assert all(0.0 <= u < 1.0 for u in values)
    counts = Counter(int(u * bins) for u in values)
    observed = [counts[b] for b in range(bins)]
    assert chi_square(observed, [draws / bins] * bins) < chi_square_limit(bins - 1)
    pairs = Counter((int(a * 10), int(b * 10)) for a, b in pairwise(values))
    observed = [pairs[a, b] for a in range(10) for b in range(10)]
    assert chi_square(observed, [(draws - 1) / 100] * 100) < chi_square_limit(99)


def test_no_words_for_different_arguments_are_equal() -> None:
    draws = {
        word(seed, index, position, stream)
        for seed in (0, 1, 2**63, -(2**63) + 1)
        for index in (0, 1, 127)
        for position in range(50)
        for stream in (0, 1)
    }
    assert len(draws) == 4 * 3 * 50 * 2


@pytest.mark.parametrize("num", [1, 100])
def test_words_drawn_together_are_those_drawn_one_by_one(num: int) -> None:
    rows, streams = [], []
    for i in range(num):
        seed = (0, 7, 2**63 + i, -(2**63) + i, MASK64 - i)[i % 5] * (1 + i)
        rows.append(SamplingRow(make_seq(output=[5] * (i % 9), seed=seed, index=i * 37 % 128)))
        streams.append(i % 4)
    expected = [
        word(row.seq.request.seed, row.seq.index, row.position, stream)
        for row, stream in zip(rows, streams, strict=True)
    ]
    assert words(rows, streams).tolist() == expected


def test_exponentials_are_made_of_splitmix64() -> None:
    # The first five for this state are published with the generator.
    assert splitmix64(1234567, 5) == [6457827717110365317, 3203168211198807973,
                                      9817491932198370423, 4593380528125082431,
                                      16408922859458223821]  # fmt: skip
    states = (1234567, 0, MASK64, 2**63)
    expected = [
        [-math.log(((one >> 12) + 0.5) * 2.0**-52) for one in splitmix64(state, 40)]
        for state in states
    ]
    found = exponentials(keys_of(*states), 40)
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0
    )
    assert torch.equal(exponentials(keys_of(*states), 90)[:, :40], found)


@pytest.mark.parametrize("by", ["place", "position", "neighbouring words"])
def test_exponentials_are_exponential_and_independent(by: str) -> None:
    if by == "place":
        found = exponentials(keys_of(*(word(i, 0, 0) for i in range(10))), 1000).flatten()
    elif by == "position":
        found = exponentials(keys_of(*(word(5, 0, i) for i in range(10_000))), 301)[:, 300]
    else:
        found = exponentials(keys_of(*range(10_000)), 7)[:, 6]
    check_uniform(torch.exp(-found).clamp(max=1 - 2**-53).tolist())


def test_exponentials_are_never_zero_or_infinite() -> None:
    # The largest and the smallest uniform number that there is.
    for uniform in (0.5 * 2.0**-52, (2**52 - 0.5) * 2.0**-52):
        assert 0.0 < uniform < 1.0
        assert 0.0 < -math.log(uniform) < 37.0
