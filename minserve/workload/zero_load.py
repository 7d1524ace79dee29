"""`measure_speed`: measures how fast a server is when it has nothing else to do.

SLOs that are slowdowns need this speed, and no API reports it. So lone requests are timed, with
prompts of several lengths that all differ, so that no prefix cache shortens them.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import aiohttp

from minserve.errors import WorkloadError
from minserve.slo.objectives import SLO, Targets
from minserve.workload.answer import Answer
from minserve.workload.client import ask
from minserve.workload.conversation import Conversation, Turn
from minserve.workload.endpoint import Endpoint, open_session
from minserve.workload.texts import CHARACTERS_PER_TOKEN, fill

PROMPT_TOKENS = (32, 128, 512, 1024)
OUTPUT_TOKENS = 24
REPEATS = 3
_NO_SLO = SLO(ttft=1e6)


@dataclass(frozen=True, slots=True)
class ZeroLoadSample:
    """A lone request: the tokens of its prompt, and its times in seconds."""

    prompt_tokens: int
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class ZeroLoad:
    """An idle server's speed, in seconds. It has the form of a `Speed`.

    Attributes:
        base_s, per_token_s: prefill of a prompt of n tokens takes base_s + per_token_s x n.
        decode_s: seconds per output token.
        characters_per_token: of this server's tokenizer, in English.
    """

    base_s: float
    per_token_s: float
    decode_s: float
    characters_per_token: float = CHARACTERS_PER_TOKEN

    def zero_load_prefill_s(self, num_tokens: int) -> float:
        return self.base_s + self.per_token_s * num_tokens

    def zero_load_decode_s(self, context_tokens: int) -> float:
        """Return the same time for any context, because it hardly matters for one request."""
        return self.decode_s

    def count_tokens(self, text: str) -> int:
        """Return about how many tokens a text has on this server."""
        return math.ceil(len(text) / self.characters_per_token)

    def to_dict(self) -> dict[str, float]:
        """Return the speed as JSON values, times in milliseconds."""
        return {
            "base_ms": round(self.base_s * 1e3, 4),
            "per_token_ms": round(self.per_token_s * 1e3, 6),
            "decode_ms": round(self.decode_s * 1e3, 4),
            "characters_per_token": round(self.characters_per_token, 4),
        }

    @classmethod
    def from_dict(cls, kept: Mapping[str, float]) -> ZeroLoad:
        """Return the speed that `to_dict` gave.

        Raises:
            KeyError, TypeError: if ``kept`` is something else.
        """
        return cls(
            kept["base_ms"] / 1e3,
            kept["per_token_ms"] / 1e3,
            kept["decode_ms"] / 1e3,
            kept["characters_per_token"],
        )


async def measure_speed(
    endpoint: Endpoint,
    *,
    seed: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ZeroLoad:
    """Time lone requests, one after another, on an idle server.

    Args:
        seed: seed of the prompts; by default they differ each time, because caches keep them.
        on_progress: called with the number of requests that are done, and of all requests.

    Raises:
        WorkloadError: if the server does not answer them.
    """
    room = (endpoint.max_model_len or math.inf) - OUTPUT_TOKENS
    # A text may well have more tokens than estimated.
    lengths = [n for n in PROMPT_TOKENS if 2 * n <= room] or [max(1, int(room) // 4)]
    # The first request meets cold caches, so it is not counted.
    plan = [lengths[0], *(length for length in lengths for _ in range(REPEATS))]
    texts = _texts(plan, random.getrandbits(64) if seed is None else seed)
    groups: dict[int, list[ZeroLoadSample]] = {length: [] for length in lengths}
    characters = tokens = 0
    async with open_session(endpoint.url) as session:
        for number, (length, text) in enumerate(zip(plan, texts, strict=True)):
            answer = await _lone_request(session, endpoint, text, length)
            if on_progress is not None:
                on_progress(number + 1, len(plan))
            if number:
                groups[length].append(_sample(answer))
                characters += len(text)
                tokens += groups[length][-1].prompt_tokens
    return fit(list(groups.values()), characters_per_token=characters / tokens)


def fit(
    groups: Sequence[Sequence[ZeroLoadSample]],
    *,
    characters_per_token: float = CHARACTERS_PER_TOKEN,
) -> ZeroLoad:
    """Fit a line through the median of each group by least squares, with no coefficient below 0.

    Args:
        groups: lone requests, grouped by about the same prompt length.
    """
    xs = [statistics.median(one.prompt_tokens for one in group) for group in groups]
    ys = [statistics.median(one.ttft_s for one in group) for group in groups]
    slope, base = 0.0, statistics.fmean(ys)
    if len(xs) > 1:
        slope, base = statistics.linear_regression(xs, ys)
        if slope < 0:
            slope, base = 0.0, statistics.fmean(ys)
        elif base < 0:
            base = 0.0
            slope = sum(x * y for x, y in zip(xs, ys, strict=True)) / sum(x * x for x in xs)
    decode_s = statistics.median(one.tpot_s for group in groups for one in group)
    return ZeroLoad(base, slope, decode_s, characters_per_token)


def _texts(lengths: Sequence[int], seed: int) -> list[str]:
    turns = [Turn(slo=_NO_SLO, prompt_tokens=length, output_tokens=1) for length in lengths]
    filled = fill([Conversation(0.0, (turn,)) for turn in turns], seed=seed)
    return [turn.text or "" for conversation in filled for turn in conversation.turns]


async def _lone_request(
    session: aiohttp.ClientSession, endpoint: Endpoint, text: str, num_tokens: int
) -> Answer:
    turn = Turn(slo=_NO_SLO, prompt_tokens=num_tokens, output_tokens=OUTPUT_TOKENS)
    answer = Answer(turn, Targets(), time.perf_counter())
    await ask(session, endpoint, answer, endpoint.body([text], OUTPUT_TOKENS))
    if answer.error is not None or len(answer.token_times) < 2:
        problem = answer.error or f"only {len(answer.token_times)} tokens came"
        raise WorkloadError(
            f"the speed of {endpoint.url} cannot be measured: a lone request failed: {problem}"
        )
    return answer


def _sample(answer: Answer) -> ZeroLoadSample:
    times = answer.token_times
    prompt_tokens = answer.prompt_tokens or answer.turn.prompt_tokens
    tpot_s = (times[-1] - times[0]) / (len(times) - 1)
    return ZeroLoadSample(prompt_tokens, times[0] - answer.sent_s, tpot_s)
