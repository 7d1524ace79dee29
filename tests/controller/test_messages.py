"""What crosses the wire comes out as it went in, and nothing else comes out."""

from __future__ import annotations

import random

import pytest
from hellos import hello

from minserve.activity import Activity, BatchTokens, ClassEnds, Cursor, IterationRecord, Lane, Mark
from minserve.controller import messages as m
from minserve.engine.stats import EngineStats
from minserve.errors import (
    GenerationError,
    InvalidRequestError,
    ProtocolError,
    SLOUnattainableError,
)
from minserve.outputs import OutputDelta, OutputTimes, TokenLogprob
from minserve.planner.replica_load import ReplicaLoad
from minserve.request import FinishReason, Request, SequenceState
from minserve.sampling_params import SamplingParams
from minserve.slo.attainment import Outcome
from minserve.slo.objectives import Standing, preset_classes

SLO = preset_classes()["reasoning"]
REQUEST = Request(
    request_id="a",
    prompt_token_ids=(1, 2, 3),
    params=SamplingParams(
        n=2,
        stop=("x", "ÿ"),
        logprobs=3,
        seed=-(2**63),
        temperature=0.3,
        logit_bias={5: -100.0, 2**40: 0.25},
        allowed_token_ids=(5, 6),
        bad_words=("ÿ",),
    ),
    seed=2**64 - 1,
    arrival_s=0.0,
    stop_token_ids=frozenset({7, 9}),
    bad_word_ids=((1, 2), (3,)),
    slo=SLO,
    targets=SLO.resolve(0.5, 0.02),
)
HELLO = hello(margin=1.1)
ACTIVITY = Activity(
    source="process",
    tick=5,
    is_whole=False,
    now_s=2.5,
    waiting=dict.fromkeys(Standing, 1),
    running={Standing.ADMITTED: 2},
    iterations=(IterationRecord(1.0, 0.5, None, 3, BatchTokens(1, 2, 3, 4, 5, 6)),),
    lanes=(
        Lane(
            seq_id="a/1",
            slo=None,
            state=SequenceState.RUNNING,
            standing=Standing.PENDING,
            arrival_s=0.5,
            started_s=1.0,
            first_token_s=None,
            ended_s=None,
            preempted_s=(1.25,),
            ttft_due_s=None,
            finish_due_s=2.5,
            tpot_s=0.1,
            num_prompt_tokens=3,
            num_cached_tokens=1,
            num_output_tokens=0,
            finish_reason=FinishReason.STOP,
            outcome=Outcome.LATE_TPOT,
            first_mark=2,
            marks=(Mark(True, 1.0, 1.5, 2, None), Mark(False, 1.5, 2.0, 3, -0.25)),
        ),
    ),
    ends=(ClassEnds(0.0, "chat", 3, 2),),
)


@pytest.mark.parametrize(
    "message",
    [
        HELLO,
        m.Welcome(),
        m.Refused("why"),
        m.Submit(
            request=REQUEST,
            age_s=0.25,
            outputs={1: m.Resumed(token_ids=(4, 5), ages_s=(0.2, 0.1), told_prompt=True)},
        ),
        m.Abort("a"),
        m.Withdraw("a"),
        m.Withdrawn("a"),
        m.Stop(),
        m.News(declined=("a",), load=ReplicaLoad(prefill_tokens=3)),
        m.Look(number=3, since=Cursor("process", 5)),
        m.Seen(number=3, activity=ACTIVITY),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_message_comes_out_as_it_went_in(message: m.Message) -> None:
    assert m.decode(m.encode(message)) == message


def test_a_delta_comes_out_with_its_log_probabilities_and_its_error() -> None:
    one = TokenLogprob(1, -0.5, 1, ((1, -0.5), (2, -1.5)))
    refused = SLOUnattainableError("later", reason="memory", retry_after_s=1.5)
    barred = InvalidRequestError("no token is left", "bad_words")
    for error in (None, refused, GenerationError("broken"), barred, InvalidRequestError("odd")):
        delta = OutputDelta(
            "a",
            1,
            "text",
            (1,),
            (one,),
            FinishReason.ERROR if error else None,
            prompt_logprobs=(None, one),
            error=error,
            times=OutputTimes(0.1, 0.2, 0.4, 3, 1),
        )
        (found,) = m.decode(m.encode(m.News(deltas=(delta,)))).deltas
        assert found._replace(error=None) == delta._replace(error=None)
        assert type(found.error) is type(error)
        assert str(found.error) == str(error)
        assert getattr(found.error, "param", None) == getattr(error, "param", None)
    assert (refused.reason, refused.retry_after_s) == ("memory", 1.5)


def test_counts_come_out_as_they_were() -> None:
    stats = EngineStats()
    stats.add_classes(["chatbot"])
    stats.ttft_s.observe(0.3)
    stats.finished[FinishReason.STOP] += 2
    found = m.decode(m.encode(m.Heartbeat(stats=stats, load=ReplicaLoad(), num_taken=1))).stats
    assert (found.slo_requests, found.finished) == (stats.slo_requests, stats.finished)
    assert (found.ttft_s.counts, found.ttft_s.total) == (stats.ttft_s.counts, 0.3)


@pytest.mark.parametrize("seed", range(20))
def test_garbage_is_a_protocol_error_and_nothing_else(seed: int) -> None:
    rng = random.Random(seed)
    whole = m.encode(m.Submit(request=REQUEST, age_s=0.1, outputs={0: m.Resumed()}))
    spoilt = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
    for data in (b"", rng.randbytes(200), whole[: rng.randrange(len(whole))], bytes(spoilt)):
        try:
            m.decode(data)
        except ProtocolError:
            continue
        assert data == bytes(spoilt), "a changed value may still be a message"


def test_values_out_of_their_range_are_refused_as_from_any_client() -> None:
    text = m.encode(m.Submit(request=REQUEST, age_s=0.1, outputs={}))
    hot = text.replace(m.msgspec.msgpack.encode(0.3), m.msgspec.msgpack.encode(-0.3))
    assert hot != text
    with pytest.raises(ProtocolError, match="temperature"):
        m.decode(hot)
