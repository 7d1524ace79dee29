"""The open-loop client against a real server whose answers follow a script."""

from __future__ import annotations

import asyncio
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from scripted_server import ScriptedServer, scripted_server
from waiting import PATIENCE_S

from minserve.errors import WorkloadError
from minserve.slo.objectives import SLO, DecodeStage
from minserve.workload import client
from minserve.workload.answer import Ending
from minserve.workload.client import Load, LoadProgress, drive, run_load
from minserve.workload.conversation import Conversation, Turn
from minserve.workload.endpoint import Endpoint, find_endpoint
from minserve.workload.verdict import Cause

PATIENT = SLO(ttft=600.0, tpot=60.0, name="patient")
IMPATIENT = SLO(ttft=0.3, tpot=0.1, name="impatient")


@pytest.fixture(autouse=True)
def _often_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run begins and ends within moments."""
    monkeypatch.setattr(client, "POLL_S", 0.01)


@dataclass
class FixedSpeed:
    prefill_s: float = 0.5
    decode_s: float = 0.1

    def zero_load_prefill_s(self, num_tokens: int) -> float:
        return self.prefill_s

    def zero_load_decode_s(self, context_tokens: int) -> float:
        return self.decode_s


def turn(text: str | None, slo: SLO = PATIENT, tokens: int = 4, **fields: Any) -> Turn:
    return Turn(slo=slo, prompt_tokens=8, output_tokens=tokens, text=text, **fields)


def one(text: str, slo: SLO = PATIENT, tokens: int = 4, at_s: float = 0.0) -> Conversation:
    return Conversation(at_s, (turn(text, slo, tokens),))


def run(server: ScriptedServer, workload: list[Conversation], **options: Any) -> Load:
    chat = options.pop("chat", False)
    endpoint = asyncio.run(find_endpoint(server.url, chat=chat))
    return run_load(endpoint, workload, FixedSpeed(), **options)


def causes(load: Load) -> list[Cause | None]:
    return [verdict.cause for verdict in load.verdicts()]


def test_answered_refused_and_failed_requests_are_told_apart() -> None:
    words = ("good", "refused", "busy", "error", "broken", "breaks", "drops", "garbage", "long")
    with scripted_server() as server:
        load = run(server, [one(word, at_s=i / 100) for i, word in enumerate(words)])
    assert load.complete
    rejected, failed = Cause.REJECTED, Cause.FAILED
    assert causes(load) == [None, rejected, rejected, *[failed] * 6]
    good, refused, _, error, broken, breaks, drops, garbage, long = load.answers
    assert len(good.token_times) == 4
    assert good.text == "<0><1><2><3>"
    assert "429" in refused.error
    assert "500" in error.error
    assert "scripted" in error.error
    assert "out of luck" in broken.error
    assert breaks.error == "the stream ended after 2 of 4 tokens"
    assert len(drops.token_times) == 2
    assert drops.error
    assert "not an event" in garbage.error
    assert "5 tokens came of 4" in long.error
    assert sum(load.errors().values()) == 8


def test_a_server_that_is_gone_fails_every_request() -> None:
    with scripted_server() as server:
        url = server.url
    load = run_load(Endpoint(url, "scripted"), [one("good"), one("good")], FixedSpeed())
    assert causes(load) == [Cause.FAILED, Cause.FAILED]
    assert list(load.errors().values()) == [2]


@pytest.mark.parametrize("usage", ["continuous", "final"])
def test_a_chunk_of_several_tokens_counts_as_several(usage: str) -> None:
    with scripted_server(usage=usage, per_chunk=3, gap_s=0.01) as server:
        load = run(server, [one("good", tokens=9)])
    times = load.answers[0].token_times
    assert len(times) == 9
    assert len(set(times)) == 3
    assert times == sorted(times)
    assert load.verdicts()[0].output_tokens == 9


def test_without_any_usage_a_chunk_is_a_token() -> None:
    with scripted_server(usage="none", per_chunk=3) as server:
        load = run(server, [one("good", tokens=9)])
    assert len(load.answers[0].token_times) == 3
    assert causes(load) == [None]


def test_latencies_count_from_the_time_a_request_was_due() -> None:
    load = Load([one("good", at_s=0.2)])

    def has_come(num_tokens: int) -> bool:
        return not num_tokens or len(load.answers[0].token_times) >= num_tokens

    # The server sends a token when the client has the one before.
    with scripted_server(may_go_on=has_come) as server:
        asyncio.run(drive(Endpoint(server.url, "scripted"), load, FixedSpeed()))
        sent = server.sent_s
    (verdict,), (answer,) = load.verdicts(), load.answers
    tokens = chain.from_iterable(zip(sent, answer.token_times, strict=True))
    in_order = [answer.due_s, answer.sent_s, *tokens]
    assert in_order == sorted(in_order)
    assert verdict.arrival_s == pytest.approx(0.2)
    assert verdict.ttft_s == answer.token_times[0] - answer.due_s
    assert verdict.ttft_s > verdict.send_lag_s > 0
    assert verdict.tpot_s == pytest.approx((answer.token_times[-1] - answer.token_times[0]) / 3)


def test_requests_go_out_at_their_time_whatever_is_outstanding() -> None:
    with scripted_server(hold_until=20) as server:
        load = run(server, [one("good", tokens=2, at_s=i / 50) for i in range(20)])
        assert server.most_open == 20
    assert load.seconds == pytest.approx(19 / 50)


def test_the_run_ends_when_nothing_outstanding_can_attain_any_more() -> None:
    with scripted_server() as server:
        load = run(server, [one("hangs", IMPATIENT), one("good")])
    assert load.complete
    assert sorted(str(cause) for cause in causes(load)) == ["Cause.UNANSWERED", "None"]


def test_silence_ends_the_wait_where_no_deadline_does() -> None:
    with scripted_server() as server:
        load = run(server, [one("hangs", SLO(tpot=1.0))], drain_s=0.2)
    assert causes(load) == [Cause.UNANSWERED]


def test_a_next_turn_repeats_the_conversation_and_waits_its_delay() -> None:
    turns = (turn("one\n"), turn("\ntwo\n", delay_s=0.2), turn("\nthree"))
    with scripted_server() as server:
        load = run(server, [Conversation(0.0, turns)])
        prompts = [body["prompt"] for body in server.bodies]
    answer = "<0><1><2><3>"
    assert prompts == ["one\n", f"one\n{answer}\ntwo\n", f"one\n{answer}\ntwo\n{answer}\nthree"]
    first, second, third = load.answers
    assert second.due_s == first.token_times[-1] + 0.2
    assert third.due_s == second.token_times[-1]
    assert causes(load) == [None] * 3


def test_turns_behind_an_unanswered_one_are_misses_that_were_never_sent() -> None:
    broken = Conversation(0.0, (turn("good\n"), turn("\nrefused"), turn("\nx"), turn("\ny")))
    cut = Conversation(0.0, (turn("hangs", IMPATIENT), turn("\nx")))
    with scripted_server() as server:
        load = run(server, [broken, cut], drain_s=0.2)
        assert len(server.bodies) == 3
    found = causes(load)
    assert found.count(Cause.NOT_SENT) == 3
    assert found.count(Cause.REJECTED) == found.count(Cause.UNANSWERED) == found.count(None) == 1


def test_outputs_are_forced_to_their_length() -> None:
    with scripted_server() as server:
        run(server, [one("good", tokens=7)])
        (body,) = server.bodies
    assert (body["max_tokens"], body["ignore_eos"], body["temperature"]) == (7, True, 0)
    assert body["skip_special_tokens"] is False
    assert body["model"] == "scripted"


def test_an_output_that_ended_early_is_an_answer_but_is_counted() -> None:
    with scripted_server() as server:
        load = run(server, [one("short"), one("good")])
    assert causes(load) == [None, None]
    assert load.num_short == 1


def test_a_strict_server_gets_openai_fields_alone() -> None:
    with scripted_server(strict=True, usage="final") as server:
        load = run(server, [one("good", tokens=3)])
    assert causes(load) == [None]
    assert len(load.answers[0].token_times) == 3


@pytest.mark.parametrize("owner", ["minserve", "vllm"])
def test_only_a_minserve_is_sent_slos(owner: str) -> None:
    slo = SLO(ttft_slowdown=3, tpot=0.5)
    with scripted_server(owner=owner) as server:
        load = run(server, [one("good", slo)])
        (body,) = server.bodies
    assert body.get("slo") == (
        {"ttft_ms": 1500.0, "tpot_ms": 500.0} if owner == "minserve" else None
    )
    assert load.answers[0].targets.ttft_s == 1.5


@pytest.mark.parametrize("thinks", [True, False])
def test_thinking_ends_at_its_count_and_is_asked_for_where_the_model_marks_it(thinks: bool) -> None:
    slo = SLO(ttft=9.0, stages=(DecodeStage(tpot=0.5, until="</think>"), DecodeStage(tpot=2.0)))
    plain = turn("good", slo, tokens=4)
    workload = [Conversation(0.0, (turn("good", slo, tokens=4, thinking_tokens=3),))]
    with scripted_server(owner="minserve", thinks=thinks) as server:
        load = run(server, [*workload, Conversation(0.0, (plain,))])
        body = server.bodies[0]
    strict = {"ttft_ms": 9000.0, "tpot_ms": 500.0}
    both = {"ttft_ms": 9000.0, "tpot_ms": 2000.0, "thinking_tpot_ms": 500.0}
    assert body["slo"] == (both if thinks else strict)
    assert [stage.tokens for stage in load.answers[0].targets.stages] == [3, None]
    assert [stage.tpot_s for stage in load.answers[1].targets.stages] == [2.0]


def test_best_effort_is_what_the_server_gave_up_and_served_late() -> None:
    slo = SLO(ttft=1e-6, name="late")
    with scripted_server(owner="minserve") as server:
        load = run(server, [one("relegated", slo), one("good", slo), one("relegated")])
    assert sorted(v.best_effort for v in load.verdicts()) == [False, False, True]


def test_chat_sends_the_conversation_as_messages() -> None:
    with scripted_server() as server:
        load = run(server, [Conversation(0.0, (turn("one"), turn("two")))], chat=True)
        bodies = server.bodies
    assert causes(load) == [None, None]
    assert [message["role"] for message in bodies[1]["messages"]] == ["user", "assistant", "user"]
    assert bodies[1]["messages"][1]["content"] == "<0><1><2><3>"


def test_two_thousand_streams_are_open_at_once() -> None:
    with scripted_server(hold_until=2000) as server:
        load = run(server, [one("good", tokens=2) for _ in range(2000)])
        assert server.most_open == 2000
    assert causes(load) == [None] * 2000


def test_progress_is_told_until_the_end() -> None:
    told: list[LoadProgress] = []
    with scripted_server() as server:
        run(server, [one("good"), one("refused")], on_progress=told.append)
    assert told[-1] == LoadProgress(due=2, open=0, done=2, attained=1)


def test_when_cancelled_a_load_keeps_what_is_known() -> None:
    workload = [one("good"), one("hangs"), one("hangs", IMPATIENT), one("good", at_s=3600.0)]

    def is_time(load: Load) -> bool:
        """The first one is answered, and the third one too late."""
        return (
            len(load.answers) == 3
            and load.answers[0].ending is Ending.DONE
            and load.answers[2].is_hopeless(time.perf_counter())
        )

    async def interrupt(url: str) -> Load:
        load = Load(workload)
        task = asyncio.create_task(drive(Endpoint(url, "scripted"), load, FixedSpeed()))
        while not is_time(load):
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return load

    with scripted_server() as server:
        started_s = time.perf_counter()
        load = asyncio.run(interrupt(server.url))
        ended_s = time.perf_counter()
    assert not load.complete
    assert causes(load) == [None, Cause.UNANSWERED]  # the other one was still in time
    assert load.num_undecided == 1
    assert started_s < load.start_s < load.end_s < ended_s
    assert load.seconds == load.end_s - load.start_s


def test_a_turn_without_a_text_cannot_be_sent() -> None:
    with scripted_server() as server, pytest.raises(WorkloadError, match="without a text"):
        run(server, [Conversation(0.0, (turn(None),))])


def test_a_turn_of_several_outputs_cannot_be_sent() -> None:
    several = replace(turn("a"), n=2)
    with scripted_server() as server, pytest.raises(WorkloadError, match="one output"):
        run(server, [Conversation(0.0, (several,))])


def test_too_few_files_are_a_clear_error() -> None:
    code = f"""
import resource, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from test_client import *
endpoint = asyncio.run(find_endpoint(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
try:
    run_load(endpoint, [one("hangs") for _ in range(100)], FixedSpeed())
except WorkloadError as error:
    print(error)
"""
    with scripted_server() as server:
        command = [sys.executable, "-c", code, server.url]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    assert "may open 40 files at once" in done.stdout, done.stderr
    assert "ulimit -n" in done.stdout


def test_the_limit_on_files_is_raised_as_far_as_is_needed() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        with scripted_server() as server:
            run(server, [one("good", tokens=1) for _ in range(300)])
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
