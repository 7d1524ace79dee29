"""The costs of a controller in front of replicas: delay of first tokens, and routing itself."""

from __future__ import annotations

import math
import random
import statistics
import time
from contextlib import ExitStack
from typing import Any

from minserve.controller.prefixes import PrefixMap, chunks_of
from minserve.controller.router import Ask, make_router
from minserve.devices import find_device
from minserve.planner.predict.perf_model import PerfModel, Piece
from minserve.planner.replica_load import ReplicaLoad
from minserve.progress_bar import progress_bar
from minserve.slo.objectives import SLO
from minserve.workload.arrivals import gamma_arrivals
from minserve.workload.client import run_load
from minserve.workload.conversation import Conversation, Turn
from minserve.workload.report import Report
from minserve.workload.server_process import ServerProcess, minserve_command
from parts.replicas.runs import MODEL
from shared.profile_file import profile_file
from shared.prompt_texts import Counter, with_texts

# A small model on a fast GPU. It delays no request: the time added to it is the software's.
FAST = PerfModel((Piece(tokens=1e-7, base=5e-3),), margin=1.02)
RATE = 100.0
PROMPT_TOKENS, OUTPUT_TOKENS = 64, 16
WARM_UP_S = 3.0
NUM_REPLICAS = 64
NUM_DECISIONS = 2000
CHAT_TOKENS = 1024


def added_to_ttft(seconds: float, pairs: int, seed: int) -> dict[str, Any]:
    """Return the median time to a first token with and without a controller, in turns.

    Args:
        seconds: time of arrivals in each run.
        pairs: number of runs of each server.

    Returns:
        milliseconds: of either server, and the added time, which is the median over pairs.
    """
    count, found = Counter(MODEL), {"direct": [], "controller": []}
    with ExitStack() as stack:
        profile = stack.enter_context(profile_file(FAST, "fast"))
        flags = ["--model", MODEL, "--executor", "simulated", "--profile", str(profile),
                 "--num-blocks", "20000", "--max-model-len", "2048"]  # fmt: skip
        endpoints = {}
        for name, replicas in (("direct", 1), ("controller", 2)):
            command = minserve_command(*flags, "--replicas", str(replicas), label=name)
            endpoints[name] = stack.enter_context(ServerProcess(command)).endpoint
        bar = stack.enter_context(progress_bar(total=2 * (pairs + 1), desc="overhead", unit="run"))
        for pair in range(-1, pairs):
            for name, endpoint in endpoints.items():
                span_s = WARM_UP_S if pair < 0 else seconds
                workload = _short_requests(span_s, seed + pair, f"{name} {pair}", count)
                load = run_load(endpoint, workload, FAST)
                bar.update()
                if pair >= 0:
                    report = Report.of(load.verdicts(), span_s).to_dict()
                    found[name].append(report["ttft_ms"]["p50"])
    added = [own - direct for direct, own in zip(found["direct"], found["controller"], strict=True)]
    return {
        "requests_per_s": RATE,
        "direct_ms": round(statistics.median(found["direct"]), 3),
        "controller_ms": round(statistics.median(found["controller"]), 3),
        "added_ms": round(statistics.median(added), 3),
    }


def _short_requests(seconds: float, seed: int, salt: str, count: Counter) -> list[Conversation]:
    rng = random.Random(seed)
    turn = Turn(
        slo=SLO(ttft=10.0, tpot=1.0), prompt_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS
    )
    times = gamma_arrivals(round(RATE * seconds), seconds, rng, burstiness=1.0)
    workload = [Conversation(at, (turn,)) for at in times]
    return with_texts(workload, count, seed=seed, salt=salt)


def routing_us(name: str, seed: int) -> dict[str, float]:
    """Return the microseconds of one decision between `NUM_REPLICAS` busy replicas.

    The lookup of a chat's prefix is included.
    """
    rng = random.Random(seed)
    router = make_router(name, NUM_REPLICAS, find_device("opt-6.7b-a100").perf_model())
    prefixes = PrefixMap()
    chats = [[rng.randrange(50000) for _ in range(CHAT_TOKENS)] for _ in range(200)]
    for chat in chats:
        prefixes.note(rng.randrange(NUM_REPLICAS), chunks_of(chat, ""))
    took = []
    for number in range(NUM_DECISIONS):
        router.report(rng.randrange(NUM_REPLICAS), _some_load(rng))
        prompt = [*rng.choice(chats), *(rng.randrange(50000) for _ in range(64))]
        began = time.perf_counter()
        ask = Ask(
            prompt_tokens=len(prompt),
            output_tokens=200,
            deadline_s=number + 0.5,
            tpot_s=rng.choice((0.05, 0.1, math.inf)),
            cached_tokens=prefixes.cached(chunks_of(prompt, ""), len(prompt)),
        )
        router.choose(ask, float(number))
        took.append(1e6 * (time.perf_counter() - began))
    took.sort()
    return {"p50": round(took[len(took) // 2], 1), "p99": round(took[len(took) * 99 // 100], 1)}


def _some_load(rng: random.Random) -> ReplicaLoad:
    return ReplicaLoad(
        prefill_tokens=rng.randrange(4000),
        decode_rate=rng.uniform(0.0, 2000.0),
        tightest_tpot_s=rng.choice((0.05, 0.1)),
        free_tokens=rng.randrange(40000),
        num_sequences=rng.randrange(100),
    )
