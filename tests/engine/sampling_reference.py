"""Sequences and logits to sample from, and slow reference code for the choice."""

from __future__ import annotations

import math
from collections import Counter

import torch

from minserve.engine.sampling.sampler import Sampler
from minserve.engine.speculation.proposal import SampledToken
from minserve.request import Request, Sequence
from minserve.sampling_params import SamplingParams

SAMPLER = Sampler()


VOCAB = 700  # not a multiple of the chunk size, and more than one chunk


def make_seq(
    prompt=(1, 2, 3), output=(), *, seed=0, index=0, stop=(), bad=(), **params
) -> Sequence:
    request = Request(
        request_id=f"r{seed}",
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(**{"max_tokens": 100, **params}),
        seed=seed,
        arrival_s=0.0,
        stop_token_ids=frozenset(stop),
        bad_word_ids=tuple(bad),
    )
    seq = Sequence(request, index=index)
    seq.token_ids += output
    return seq


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0, scale: float = 3.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def token_ids(results) -> list[int]:
    assert all(isinstance(result, SampledToken) for result in results)
    return [result.token_id for result in results]


def reference_distribution(logits: list[float], seq: Sequence) -> list[float]:
    """Exact sampling probabilities, token by token in plain Python."""
    p, x = seq.request.params, list(logits)
    output = Counter(seq.output_token_ids)
    for t, bias in p.logit_bias.items():
        x[t] += bias
    for t in set(seq.token_ids):
        x[t] = x[t] / p.repetition_penalty if x[t] > 0 else x[t] * p.repetition_penalty
    for t, n in output.items():
        x[t] -= p.frequency_penalty * n + p.presence_penalty
    if seq.num_output_tokens < p.min_tokens:
        for t in seq.request.stop_token_ids:
            x[t] = -math.inf
    if p.allowed_token_ids:
        x = [v if t in p.allowed_token_ids else -math.inf for t, v in enumerate(x)]
    for *beginning, last in seq.request.bad_word_ids:
        if seq.output_token_ids[max(0, seq.num_output_tokens - len(beginning)) :] == beginning:
            x[last] = -math.inf
    if p.greedy:
        return [float(t == x.index(max(x))) for t in range(len(x))]
    best = max(x)
    w = [math.exp((v - best) / p.temperature) for v in x]
    w = [v if v >= p.min_p * max(w) else 0.0 for v in w]
    if p.top_k:
        kth = sorted(w, reverse=True)[min(p.top_k, len(w)) - 1]
        w = [v if v >= kth else 0.0 for v in w]
    if p.top_p < 1.0:
        total, mass, kept = math.fsum(w), 0.0, set()
        for t in sorted(range(len(w)), key=lambda t: (-w[t], t)):
            if mass >= p.top_p * total:
                break
            mass += w[t]
            kept.add(t)
        w = [v if t in kept else 0.0 for t, v in enumerate(w)]
    total = math.fsum(w)
    return [v / total for v in w]


def splitmix64(state: int, num: int) -> list[int]:
    """The first outputs of SplitMix64, by its published code."""
    found = []
    for _ in range(num):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        found.append(z ^ (z >> 31))
    return found


CHUNK = 256


def reference_token(probabilities: list[float], word: int) -> tuple[int, float]:
    """The winner of a race of chunks and of one of its tokens, and the smaller lead, in nats."""
    sums = [math.fsum(probabilities[i : i + CHUNK]) for i in range(0, len(probabilities), CHUNK)]
    words = splitmix64(word, CHUNK + len(sums))
    times = [-math.log(((one >> 12) + 0.5) * 2.0**-52) for one in words]
    chunk, lead = _winner(sums, times[CHUNK:])
    token, own_lead = _winner(probabilities[chunk * CHUNK : (chunk + 1) * CHUNK], times)
    return chunk * CHUNK + token, min(lead, own_lead)


def _winner(rates: list[float], times: list[float]) -> tuple[int, float]:
    scores = [
        math.log(r) - math.log(e) if r else -math.inf for r, e in zip(rates, times, strict=False)
    ]
    second, best = sorted([-math.inf, *scores])[-2:]
    return scores.index(best), best - second


def chi_square_limit(degrees: int) -> float:
    """Wilson and Hilferty's approximation of the 1 - 1e-6 quantile."""
    a = 2 / (9 * degrees)
    return degrees * (1 - a + 4.753 * math.sqrt(a)) ** 3


def chi_square(counts: list[int], expected: list[float]) -> float:
    return sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True))


SETTINGS = [
    {"temperature": 0.0},
    {"top_k": 1},
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 5},
    {"top_k": 10_000},
    {"top_p": 0.5},
    {"top_p": 0.95, "temperature": 1.7},
    {"top_p": 1e-9},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"min_p": 0.02, "top_k": 20, "top_p": 0.7, "temperature": 1.3},
    {"repetition_penalty": 1.8, "temperature": 0.0},
    {"repetition_penalty": 0.4},
    {"frequency_penalty": 1.1},
    {"frequency_penalty": -2.0, "temperature": 0.0},
    {"presence_penalty": 2.0},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.7, "presence_penalty": -0.5, "top_p": 0.8},
    {"min_tokens": 50},
    {"min_tokens": 50, "temperature": 0.0},
    {"min_tokens": 4},
    {"logit_bias": {5: 6.0, 699: -100.0, 9: 2.5}},
    {"logit_bias": {11: 100.0, 7: -3.0}, "repetition_penalty": 1.5, "temperature": 0.0},
    {"allowed_token_ids": (3, 300, 11, 650)},
    {"allowed_token_ids": (3, 300, 11, 650), "min_tokens": 50, "top_k": 2},
    {"allowed_token_ids": (9, 5, 9, 7), "temperature": 0.0, "logit_bias": {7: 4.0}},
    {"bad_words": ("x",)},
    {"bad_words": ("x",), "temperature": 0.0},
]
