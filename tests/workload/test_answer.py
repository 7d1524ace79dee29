"""An answer's token times, and how it is judged, by times that are given."""

from __future__ import annotations

import json
import math

import pytest

from minserve.slo.objectives import SLO, StageTarget, Targets
from minserve.workload.answer import STAGE_PATIENCE_S, Answer, Ending
from minserve.workload.conversation import Turn
from minserve.workload.verdict import Cause

TARGETS = Targets(ttft_s=1.0, stages=(StageTarget(tpot_s=0.1),))
DUE_S = 100.0


def answer(
    times: list[float], tokens: int | None = None, ending: Ending = Ending.DONE, **fields: object
) -> Answer:
    """An answer that was due at 100 s, its token times relative to that."""
    count = max(1, len(times)) if tokens is None else tokens
    turn = Turn(slo=SLO(ttft=1, name="chat"), prompt_tokens=5, output_tokens=count)
    known = {"targets": TARGETS, "sent_s": DUE_S + 0.002, "ending": ending}
    return Answer(turn, due_s=DUE_S, token_times=[DUE_S + t for t in times], **{**known, **fields})


def event(text: str = "a", usage: int | None = None, reason: str | None = None) -> bytes:
    told = {} if usage is None else {"usage": {"completion_tokens": usage, "prompt_tokens": 9}}
    return json.dumps({"choices": [{"text": text, "finish_reason": reason}], **told}).encode()


def closing(usage: int, **more: object) -> bytes:
    return json.dumps({"choices": [], "usage": {"completion_tokens": usage, **more}}).encode()


def reading(tokens: int, *events: bytes) -> Answer:
    """Events that came at 1, 2, 3... seconds."""
    one = answer([], tokens, Ending.CUT)
    for now, payload in enumerate(events, 1):
        one.read_event(payload, float(now))
    one.close()
    return one


# --- events ---


def test_a_chunk_stands_for_as_many_tokens_as_its_usage_grew_by() -> None:
    events = [event(usage=1), event(usage=3), event(usage=3), event(usage=4)]
    one = reading(4, *events, closing(4, slo={"admitted": True}), b"[DONE]")
    assert one.token_times == [1.0, 2.0, 2.0, 4.0]
    assert (one.ending, one.text, one.prompt_tokens) == (Ending.DONE, "aaaa", 9)
    assert one.reported == {"admitted": True}


def test_tokens_that_only_the_last_usage_tells_came_with_it() -> None:
    one = reading(3, event(usage=1), event(usage=2), closing(3), b"[DONE]")
    assert one.token_times == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("count", "times"),
    [
        (3, [1.0, 2.0, 3.0]),
        (5, [1.0, 1.0, 2.0, 3.0, 3.0]),
        (6, [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]),
        (2, [1.0, 3.0]),
        (1, [1.0]),
    ],
)
def test_chunks_are_reconciled_with_the_final_count(count: int, times: list[float]) -> None:
    one = reading(6, event(), event(), event(), closing(count), b"[DONE]")
    assert one.token_times == times


def test_chunks_without_text_are_no_tokens_where_nothing_is_counted() -> None:
    one = reading(2, event(""), event(), event(), event("", reason="length"), b"[DONE]")
    assert one.token_times == [2.0, 3.0]


def test_a_stream_may_end_without_its_marker_but_not_without_a_reason() -> None:
    assert reading(2, event(), event(reason="length")).ending is Ending.DONE
    broken = reading(2, event())
    assert (broken.ending, broken.error) == (
        Ending.FAILED,
        "the stream ended after 1 of 2 tokens",
    )


def test_an_error_in_mid_stream_is_a_failure() -> None:
    one = reading(2, event(), b'{"error": {"message": "out of luck"}}', b"[DONE]")
    assert (one.ending, one.token_times) == (Ending.FAILED, [1.0])
    assert "out of luck" in one.error


@pytest.mark.parametrize(
    "payload", [b"{", b"3", b'"x"', b'{"choices": [3]}', b'{"choices": 1}', b'{"usage": 7}']
)
def test_what_is_no_event_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        reading(2, payload)


def test_chat_tokens_may_be_thoughts() -> None:
    events = [json.dumps({"choices": [{"delta": {name: "x"}}]}).encode()
              for name in ("reasoning_content", "reasoning", "content")]  # fmt: skip
    assert len(reading(3, *events, b"[DONE]").token_times) == 3


# --- hope ---


@pytest.mark.parametrize(
    ("times", "now", "hopeless"),
    [
        ([], 0.9, False),  # the first token may still be in time
        ([], 1.1, True),
        ([1.1], 1.2, True),  # it was late
        ([0.5], 0.8, False),  # the second is late, but the mean may recover
        ([0.5], 0.91, True),  # all five were due at 0.9
    ],
)
def test_a_request_is_hopeless_once_no_form_of_attainment_is_left(
    times: list[float], now: float, hopeless: bool
) -> None:
    assert answer(times, tokens=5).is_hopeless(DUE_S + now) is hopeless


def test_a_stages_first_token_may_come_late() -> None:
    stages = (StageTarget(tpot_s=0.1, tokens=3), StageTarget(tpot_s=1.0))
    one = answer([0.5], tokens=5, targets=Targets(ttft_s=1.0, stages=stages))
    assert one.has_last_deadline
    assert not one.is_hopeless(DUE_S + 0.5 + 1.2 + STAGE_PATIENCE_S - 0.01)
    assert one.is_hopeless(DUE_S + 0.5 + 1.2 + STAGE_PATIENCE_S + 0.01)


@pytest.mark.parametrize("targets", [Targets(ttft_s=1.0), Targets(stages=TARGETS.stages)])
def test_without_a_promise_there_is_no_last_deadline(targets: Targets) -> None:
    assert not answer([], tokens=5, targets=targets).has_last_deadline
    assert answer([], tokens=1, targets=Targets(ttft_s=1.0)).has_last_deadline


# --- verdicts ---


@pytest.mark.parametrize(
    ("one", "cause", "attained_mean"),
    [
        (answer([1.0, 1.1, 1.2]), None, True),
        (answer([1.01, 1.1, 1.2]), Cause.LATE_TTFT, False),
        (answer([0.5, 0.65, 0.7]), Cause.LATE_TPOT, True),
        (answer([0.5, 0.65, 0.75]), Cause.LATE_TPOT, False),
        (answer([0.5, 0.55], 9, Ending.CUT), Cause.LATE_TPOT, False),
        (answer([], 9, Ending.CUT), Cause.UNANSWERED, False),
        (answer([], 9, Ending.DONE), Cause.UNANSWERED, False),
        (answer([], 9, Ending.REJECTED), Cause.REJECTED, False),
        (answer([0.5, 0.55], 9, Ending.FAILED), Cause.FAILED, False),
        (answer([], 9, Ending.NOT_SENT), Cause.NOT_SENT, False),
    ],
)
def test_misses_are_told_apart_by_cause(
    one: Answer, cause: Cause | None, attained_mean: bool
) -> None:
    verdict = one.verdict(90.0)
    assert (verdict.cause, verdict.attained_mean) == (cause, attained_mean)


def test_latencies_count_from_the_time_a_request_was_due() -> None:
    verdict = answer([0.5, 0.7, 0.8]).verdict(90.0)
    assert verdict.arrival_s == 10.0
    assert verdict.ttft_s == pytest.approx(0.5)
    assert verdict.tpot_s == pytest.approx(0.15)
    assert verdict.send_lag_s == pytest.approx(0.002)
    assert (verdict.name, verdict.prompt_tokens, verdict.output_tokens) == ("chat", 5, 3)


def test_what_was_never_sent_was_not_late() -> None:
    assert answer([], 9, Ending.NOT_SENT, sent_s=math.nan).verdict(0.0).send_lag_s == 0.0
