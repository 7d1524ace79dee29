"""Finds, once at start, the SLO classes that this device cannot keep even for a lone request."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import indent

from minserve.planner.predict.perf_model import PerfModel
from minserve.slo.objectives import SLO
from minserve.tables import text_table

# A prompt and context of middling length, for objectives in absolute seconds.
TYPICAL_TOKENS = 512
TYPICAL_OUTPUT = 128
# Of a miss that scatter brings about, from which on an objective is one that the device misses.
RISK = 0.1


@dataclass(frozen=True, slots=True)
class Miss:
    """An objective that a request would miss even if it had the device for itself.

    Attributes:
        name: name of the class.
        objective: ``ttft``, ``tpot``, with the stage if there are several, or ``finish``, for an
            output of middling length.
        promised_s: seconds that the class promises.
        needed_s: seconds that the device stays within in nine of ten cases.
    """

    name: str
    objective: str
    promised_s: float
    needed_s: float


def lone_request_misses(
    classes: Mapping[str, SLO], model: PerfModel, num_tokens: int = TYPICAL_TOKENS
) -> list[Miss]:
    """Return the objectives that a lone request misses.

    Args:
        num_tokens: number of tokens of its prompt.
    """
    prefill_s, decode_s = (
        model.zero_load_prefill_s(num_tokens),
        model.zero_load_decode_s(num_tokens),
    )
    # The prompt is one iteration; a pace lasts for many, which even out.
    needed_ttft = prefill_s * model.bound(1, RISK)
    needed_tpot = decode_s * model.bound(TYPICAL_OUTPUT, RISK)
    needed_finish = needed_ttft + (TYPICAL_OUTPUT - 1) * needed_tpot
    misses = []
    for name, slo in classes.items():
        targets = slo.resolve(prefill_s, decode_s)
        if targets.ttft_s < needed_ttft:
            misses.append(Miss(name, "ttft", targets.ttft_s, needed_ttft))
        for number, stage in enumerate(targets.stages, 1):
            if math.isfinite(stage.tpot_s) and stage.tpot_s < needed_tpot:
                which = f"tpot of stage {number}" if len(targets.stages) > 1 else "tpot"
                misses.append(Miss(name, which, stage.tpot_s, needed_tpot))
        if targets.finish_s < needed_finish:
            misses.append(Miss(name, "finish", targets.finish_s, needed_finish))
    return misses


def describe_misses(misses: list[Miss], num_tokens: int = TYPICAL_TOKENS) -> str:
    """Return a table of the misses for the console; an empty text if there are none."""
    if not misses:
        return ""
    rows = [
        (one.name, one.objective, f"{one.promised_s * 1e3:.1f} ms", f"{one.needed_s * 1e3:.1f} ms")
        for one in misses
    ]
    table = text_table(("class", "objective", "promised", "needed"), rows, left=2)
    head = f"a lone request of {num_tokens} prompt tokens would miss these SLOs on this device:"
    return f"{head}\n{indent(table, '  ')}"
