"""Whole servers over HTTP: full batches of streams, and single requests that come at random.

The client is the same for all servers, shares the machine with them, and asks for no SLO.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minserve.slo.objectives import SLO
from minserve.workload.answer import Answer, Ending
from minserve.workload.arrivals import gamma_arrivals
from minserve.workload.client import run_load
from minserve.workload.conversation import Conversation, Turn
from minserve.workload.server_process import ServerCommand
from minserve.workload.zero_load import ZeroLoad
from parts.offline.measure import OUTPUT, PROMPT
from shared.prompt_texts import with_texts
from shared.servers import Served, started

STREAMS = 32
WARM_UP_TOKENS = 16
# A server that sends nothing for so many seconds hangs.
SILENCE_S = 300.0
NO_SLO = SLO(ttft=1e6)
# No SLO is a multiple of this speed, so it has no effect.
NO_SPEED = ZeroLoad(0.0, 0.0, 0.0)

Count = Callable[[str], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomLoad:
    """Requests that come at random (Poisson).

    Attributes:
        rate: requests per second.
        seconds: time of arrivals.
        tokens_in, tokens_out: prompt and output tokens of each request.
    """

    rate: float = 12.0
    seconds: float = 30.0
    tokens_in: int = 76
    tokens_out: int = 25
    seed: int = 0

    def draw(self, count: Count) -> list[Conversation]:
        """Return the requests, the same in every call.

        Args:
            count: returns the tokens of a text.
        """
        number = max(1, round(self.rate * self.seconds))
        arrivals = gamma_arrivals(number, self.seconds, random.Random(self.seed))
        return _requests(arrivals, self.tokens_in, self.tokens_out, count, f"mixed {self.seed}")


def measure_server(
    variant: ServerCommand, load: RandomLoad, repeats: int, count: Count
) -> dict[str, list[float]]:
    """Start a server, measure it and stop it.

    Args:
        repeats: repeats of the full batch; the random load is sent once.
        count: returns the tokens of a text.

    Returns:
        the values of rows whose names begin with ``server``.
    """
    with started([variant]) as servers:
        [server] = servers.values()
        _drive(server, _streams(WARM_UP_TOKENS, count, "warm up"))
        full = [_full_batch(server, count, f"full {i}") for i in range(repeats)]
        answers = _drive(server, load.draw(count))
    return {"server_b32": full} | {name: [value] for name, value in mixed_rows(answers).items()}


def _full_batch(server: Served, count: Count, salt: str) -> float:
    answers = _drive(server, _streams(OUTPUT, count, salt))
    try:
        return steady_rate([answer.token_times for answer in answers])
    except ValueError as error:
        raise server.failed(f"does not serve {STREAMS} streams at once: {error}") from None


def steady_rate(streams: Sequence[Sequence[float]]) -> float:
    """Return the tokens per second of all streams together while all of them decode.

    This is the time from the last first token of a stream to the earliest last token.

    Args:
        streams: for each stream the times of its tokens, in seconds.

    Raises:
        ValueError: if there is no moment at which all of them decode.
    """
    start, end = max(times[0] for times in streams), min(times[-1] for times in streams)
    if end <= start:
        raise ValueError("some streams ended before others began")
    return sum(start < at <= end for times in streams for at in times) / (end - start)


def mixed_rows(answers: Sequence[Answer]) -> dict[str, float]:
    """Return the rows of a random load.

    They are output tokens per second from the first arrival to the last token, and latencies in
    milliseconds.
    """
    start, end = min(one.due_s for one in answers), max(one.last_heard_s for one in answers)
    progress = [one.progress() for one in answers]
    first = [1e3 * one.ttft_s for one in progress if one.ttft_s is not None]
    paces = [1e3 * one.mean_tpot_s for one in progress if one.mean_tpot_s is not None]
    return {
        "server_mixed": sum(len(one.token_times) for one in answers) / (end - start),
        "server_mixed_ttft_p50": statistics.median(first),
        "server_mixed_ttft_mean": statistics.mean(first),
        "server_mixed_tpot_p50": statistics.median(paces),
        "server_mixed_tpot_mean": statistics.mean(paces),
    }


def _drive(server: Served, workload: Sequence[Conversation]) -> list[Answer]:
    """Send a workload and return the answers.

    Raises:
        SystemExit: if not all requests are answered in full.
    """
    load = run_load(
        server.endpoint, workload, NO_SPEED, slo_field=lambda _: None, drain_s=SILENCE_S
    )
    if not load.complete:
        raise KeyboardInterrupt
    if any(one.ending is not Ending.DONE or one.was_short for one in load.answers):
        raise server.failed(f"did not answer everything: {load.errors()}")
    return load.answers


def _streams(tokens_out: int, count: Count, salt: str) -> list[Conversation]:
    """Return a full batch of requests that all come at once."""
    return _requests([0.0] * STREAMS, PROMPT, tokens_out, count, salt)


def _requests(
    arrivals: Sequence[float], tokens_in: int, tokens_out: int, count: Count, salt: str
) -> list[Conversation]:
    turn = Turn(slo=NO_SLO, prompt_tokens=tokens_in, output_tokens=tokens_out)
    drawn = [Conversation(at, (turn,)) for at in arrivals]
    return with_texts(drawn, count, seed=0, salt=salt)
