"""What the page's feed tells, as JSON: an engine's activity and counts, in milliseconds.

``docs/page.md`` describes the fields for readers, and `FRAME_SCHEMA` for programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from minserve.activity import Activity, IterationRecord, Lane, Mark
from minserve.outputs import acceptance
from minserve.server.engine_face import EngineFace
from minserve.slo.attainment import Outcome
from minserve.slo.objectives import SLO

if TYPE_CHECKING:
    from minserve.engine.stats import EngineStats


def about(engine: EngineFace, model: str) -> dict[str, Any]:
    """Return what does not change: the model, how it is asked, and the SLO classes."""
    return {
        "model": model,
        "chat": engine.tokenizer.has_chat_template,
        "max_model_len": engine.max_model_len,
        "policy": engine.config.policy,
        "default_class": None if engine.default_slo is None else engine.default_slo.name,
        "classes": [_slo_class(name, slo) for name, slo in engine.slo_classes.items()],
    }


def frame(engine: EngineFace, activities: Mapping[str, Activity]) -> dict[str, Any]:
    """Return how things stand, and what the engine or its replicas did since the frame before."""
    counts = engine.stats_by_replica()
    if engine.replica_set is None:
        states = {"0": "up" if engine.is_healthy else "down"}
    else:
        states = {str(one["replica"]): one["state"] for one in engine.replica_set.replicas()}
    return {
        "unfinished": engine.num_unfinished,
        "replicas": [
            {
                "replica": name,
                "state": state,
                "totals": _totals(counts[name]),
                "activity": activity_json(activities[name]) if name in activities else None,
            }
            for name, state in states.items()
        ],
    }


def _slo_class(name: str, slo: SLO) -> dict[str, Any]:
    last = slo.decode_stages[-1]
    return {
        "name": name,
        "ttft_ms": _ms(slo.ttft),
        "ttft_slowdown": slo.ttft_slowdown,
        "tpot_ms": _ms(last.tpot),
        "tpot_slowdown": last.tpot_slowdown,
        "finish_ms": _ms(slo.finish),
    }


def _totals(stats: EngineStats) -> dict[str, Any]:
    """Return counts since the start, and the share of KV blocks in use."""
    ended: dict[str, int] = {}
    for (name, _), num in stats.slo_requests.items():
        ended[name] = ended.get(name, 0) + num
    drafts = stats.speculation
    return {
        "kv_usage": round(stats.kv_usage, 4),
        "prefix_queries": stats.num_prefix_queries,
        "prefix_hits": stats.num_prefix_hits,
        "drafts": acceptance(drafts.num_draft_tokens, drafts.num_accepted_tokens),
        "preemptions": stats.num_preemptions,
        "prompt_tokens": stats.num_prompt_tokens,
        "generation_tokens": stats.num_generation_tokens,
        "classes": [
            {
                "name": name,
                "ended": num,
                "attained": stats.slo_requests[name, Outcome.ATTAINED],
            }
            for name, num in ended.items()
            if num
        ],
    }


def activity_json(seen: Activity) -> dict[str, Any]:
    """Return what an engine did lately, for JSON."""
    return {
        "is_whole": seen.is_whole,
        "now_ms": _ms(seen.now_s),
        "waiting": {one.value: num for one, num in seen.waiting.items()},
        "running": {one.value: num for one, num in seen.running.items()},
        "iterations": [_iteration(one) for one in seen.iterations],
        "lanes": [_lane(one) for one in seen.lanes],
        "ends": [
            {
                "since_ms": _ms(one.since_s),
                "class": one.name,
                "ended": one.num_ended,
                "attained": one.num_attained,
            }
            for one in seen.ends
        ],
    }


def _iteration(one: IterationRecord) -> dict[str, Any]:
    return {
        "began_ms": _ms(one.began_s),
        "took_ms": _ms(one.seconds),
        "predicted_ms": _ms(one.predicted_s),
        "sequences": one.num_seqs,
        **one.tokens._asdict(),
    }


def _lane(one: Lane) -> dict[str, Any]:
    return {
        "id": one.seq_id,
        "class": one.slo,
        "state": one.state.value,
        "standing": one.standing.value,
        "arrival_ms": _ms(one.arrival_s),
        "started_ms": _ms(one.started_s),
        "first_token_ms": _ms(one.first_token_s),
        "ended_ms": _ms(one.ended_s),
        "preempted_ms": [_ms(at) for at in one.preempted_s],
        "ttft_due_ms": _ms(one.ttft_due_s),
        "finish_due_ms": _ms(one.finish_due_s),
        "tpot_ms": _ms(one.tpot_s),
        "prompt_tokens": one.num_prompt_tokens,
        "cached_tokens": one.num_cached_tokens,
        "output_tokens": one.num_output_tokens,
        "finish_reason": None if one.finish_reason is None else one.finish_reason.value,
        "outcome": None if one.outcome is None else one.outcome.value,
        "first_mark": one.first_mark,
        "marks": [_mark(mark) for mark in one.marks],
    }


def _mark(one: Mark) -> list[Any]:
    kind = "prefill" if one.is_prefill else "output"
    return [kind, _ms(one.from_s), _ms(one.to_s), one.num_tokens, _ms(one.slack_s)]


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 1)


_COUNT = {"type": "integer", "minimum": 0}
_NUMBER = {"type": "number"}
_NUMBER_OR_NULL = {"type": ["number", "null"]}
_TEXT = {"type": "string"}
_TEXT_OR_NULL = {"type": ["string", "null"]}


def _object(**fields: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    }


def _array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_BY_STANDING = _object(pending=_COUNT, admitted=_COUNT, best_effort=_COUNT)
_CLASS_COUNTS = {"ended": _COUNT, "attained": _COUNT}
_ITERATION = _object(
    began_ms=_NUMBER,
    took_ms=_NUMBER,
    predicted_ms=_NUMBER_OR_NULL,
    sequences=_COUNT,
    decode=_COUNT,
    draft=_COUNT,
    prefill=_COUNT,
    best_effort_decode=_COUNT,
    best_effort_draft=_COUNT,
    best_effort_prefill=_COUNT,
)
_MARK = {
    "type": "array",
    "prefixItems": [
        {"enum": ["prefill", "output"]},
        {**_NUMBER, "description": "from, in ms"},
        {**_NUMBER, "description": "to, in ms"},
        {**_COUNT, "description": "tokens"},
        {**_NUMBER_OR_NULL, "description": "ms before the deadline; negative: late"},
    ],
    "minItems": 5,
    "maxItems": 5,
}
_LANE = _object(
    **{
        "id": _TEXT,
        "class": _TEXT_OR_NULL,
        "state": {"enum": ["waiting", "running", "finished"]},
        "standing": {"enum": ["pending", "admitted", "best_effort"]},
        "arrival_ms": _NUMBER,
        "started_ms": _NUMBER_OR_NULL,
        "first_token_ms": _NUMBER_OR_NULL,
        "ended_ms": _NUMBER_OR_NULL,
        "preempted_ms": _array(_NUMBER),
        "ttft_due_ms": _NUMBER_OR_NULL,
        "finish_due_ms": _NUMBER_OR_NULL,
        "tpot_ms": _NUMBER_OR_NULL,
        "prompt_tokens": _COUNT,
        "cached_tokens": _COUNT,
        "output_tokens": _COUNT,
        "finish_reason": _TEXT_OR_NULL,
        "outcome": _TEXT_OR_NULL,
        "first_mark": _COUNT,
        "marks": _array(_MARK),
    }
)
_TOTALS = _object(
    kv_usage=_NUMBER,
    prefix_queries=_COUNT,
    prefix_hits=_COUNT,
    drafts=_object(draft_tokens=_COUNT, accepted_tokens=_COUNT, rate=_NUMBER_OR_NULL),
    preemptions=_COUNT,
    prompt_tokens=_COUNT,
    generation_tokens=_COUNT,
    classes=_array(_object(name=_TEXT, **_CLASS_COUNTS)),
)
_ACTIVITY = _object(
    is_whole={"type": "boolean"},
    now_ms=_NUMBER,
    waiting=_BY_STANDING,
    running=_BY_STANDING,
    iterations=_array(_ITERATION),
    lanes=_array(_LANE),
    ends=_array(_object(**{"since_ms": _NUMBER, "class": _TEXT, **_CLASS_COUNTS})),
)
_ABOUT = _object(
    model=_TEXT,
    chat={"type": "boolean"},
    max_model_len=_COUNT,
    policy=_TEXT,
    default_class=_TEXT_OR_NULL,
    classes=_array(
        _object(
            name=_TEXT,
            ttft_ms=_NUMBER_OR_NULL,
            ttft_slowdown=_NUMBER_OR_NULL,
            tpot_ms=_NUMBER_OR_NULL,
            tpot_slowdown=_NUMBER_OR_NULL,
            finish_ms=_NUMBER_OR_NULL,
        )
    ),
)
# The first frame of a feed has `about` too.
FRAME_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "about": _ABOUT,
        "unfinished": _COUNT,
        "replicas": _array(
            _object(
                replica=_TEXT,
                state=_TEXT,
                totals=_TOTALS,
                activity={"anyOf": [_ACTIVITY, {"type": "null"}]},
            )
        ),
    },
    "required": ["unfinished", "replicas"],
    "additionalProperties": False,
}
