"""Requests that began elsewhere go on here as if nobody had ever stopped them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from relayed import intake_for

from minserve import Engine, SamplingParams
from minserve.engine.live_output import History
from minserve.engine.relay import RelayEngine
from minserve.errors import InvalidRequestError
from minserve.outputs import OutputDelta
from minserve.request import FinishReason, Request
from minserve.sampling_params import MAX_N
from minserve.slo.attainment import Outcome, SLOReport
from minserve.slo.objectives import SLO

SETTINGS = {"dtype": "float32", "threads": 1, "token_budget": 64, "max_num_seqs": 16,
            "num_blocks": 80, "block_size": 8, "policy": "sarathi"}  # fmt: skip
PROMPT = "Grüße aus Köln: the quick brown fox"
LENGTH = 24
WAYS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True),
    "seeded": SamplingParams(max_tokens=LENGTH, ignore_eos=True, seed=5),
    "penalized": SamplingParams(
        max_tokens=LENGTH, ignore_eos=True, seed=7, presence_penalty=2.0, frequency_penalty=1.0
    ),
    "repetitive": SamplingParams(
        temperature=0.0, max_tokens=LENGTH, ignore_eos=True, repetition_penalty=1.5
    ),
}
# Wide enough for the break between two replicas.
PATIENT = SLO(ttft=1.0, tpot=60.0)


@pytest.fixture(scope="module")
def engine(tiny_llama_dir: Path) -> Engine:
    return Engine(str(tiny_llama_dir), **SETTINGS)


@pytest.fixture
def relay(tiny_llama_dir: Path) -> RelayEngine:
    return RelayEngine(str(tiny_llama_dir), **SETTINGS)


def checked(relay: RelayEngine, params: SamplingParams, slo: SLO | None = None) -> Request:
    """A request as a controller's own intake makes it."""
    return intake_for(relay).request(PROMPT, params, slo=slo)[1]


def run(
    relay: RelayEngine, request: Request, histories: Mapping[int, History]
) -> dict[int, list[OutputDelta]]:
    """All news of a request, by output."""
    relay.add(request, histories)
    found: dict[int, list[OutputDelta]] = {index: [] for index in histories}
    while relay.has_work:
        for delta in relay.step().deltas:
            found[delta.index].append(delta)
    return found


def told(deltas: list[OutputDelta]) -> tuple[list[int], str]:
    """The tokens and the text of news."""
    tokens = [token for delta in deltas for token in delta.token_ids]
    return tokens, "".join(delta.text for delta in deltas)


def history(token_ids: list[int], **more: Any) -> History:
    return History(tuple(token_ids), tuple(time.monotonic() for _ in token_ids), **more)


@pytest.mark.parametrize("way", WAYS)
def test_an_output_goes_on_with_the_tokens_and_the_text_that_were_not_told(
    engine: Engine, relay: RelayEngine, way: str
) -> None:
    undisturbed = list(engine.stream(PROMPT, WAYS[way]))
    tokens, _ = told(undisturbed)
    assert len(tokens) == LENGTH == len(undisturbed)
    for num_told in (0, 1, 7, 16, LENGTH - 1):
        before, after = undisturbed[:num_told], undisturbed[num_told:]
        found = run(relay, checked(relay, WAYS[way]), {0: history(told(before)[0])})
        assert told(found[0]) == told(after)
        assert found[0][-1].finish_reason is FinishReason.LENGTH


def test_a_stop_token_that_the_models_head_lacks_refuses_no_request(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """Files that were copied from another model may name one."""
    folder = Path(shutil.copytree(tiny_llama_dir, tmp_path / "m"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 1000000]}')
    relay = RelayEngine(str(folder), **SETTINGS)
    request = checked(relay, replace(WAYS["greedy"], ignore_eos=False, max_tokens=4))
    assert request.stop_token_ids == {2}
    assert told(run(relay, request, {0: history([])})[0])[0]


def test_of_two_outputs_the_one_that_is_missing_has_ended(
    engine: Engine, relay: RelayEngine
) -> None:
    params = replace(WAYS["seeded"], n=2)
    outputs = [one.token_ids for one in engine.generate(PROMPT, params)[0].outputs]
    assert outputs[0] != outputs[1]
    for index in (0, 1):
        found = run(relay, checked(relay, params), {index: history(outputs[index][:9])})
        assert list(found) == [index]
        assert told(found[index])[0] == outputs[index][9:]
    both = {0: history(outputs[0][:3]), 1: history(outputs[1][:20])}
    found = run(relay, checked(relay, params), both)
    assert [told(found[i])[0] for i in (0, 1)] == [outputs[0][3:], outputs[1][20:]]


def test_a_stop_string_is_found_where_its_beginning_was_held_back_elsewhere(
    engine: Engine, relay: RelayEngine
) -> None:
    text = engine.generate(PROMPT, WAYS["greedy"])[0].outputs[0].text
    at = len(text) // 2
    params = replace(WAYS["greedy"], stop=(text[at : at + 4],))
    undisturbed = list(engine.stream(PROMPT, params))
    assert undisturbed[-1].finish_reason is FinishReason.STOP
    tokens, text = told(undisturbed)
    held_back = 0
    for num_told in range(len(tokens)):
        before = told(undisturbed[:num_told])
        held_back += num_told > 0 and undisturbed[num_told - 1].text == ""
        found = run(relay, checked(relay, params), {0: history(before[0])})
        assert told(found[0]) == (tokens[num_told:], text.removeprefix(before[1]))
        assert found[0][-1].stop_reason == params.stop[0]
    assert held_back


def test_log_probabilities_go_on_and_the_prompts_are_told_once(
    engine: Engine, relay: RelayEngine
) -> None:
    params = replace(WAYS["greedy"], logprobs=2, prompt_logprobs=1)
    (result,) = engine.generate(PROMPT, params)
    whole = result.outputs[0]
    known = history(whole.token_ids[:10], told_prompt=True)
    (resumed,) = run(relay, checked(relay, params), {0: known}).values()
    assert all(delta.prompt_logprobs is None for delta in resumed)
    found = [one for delta in resumed for one in delta.logprobs]
    assert [(x.token_id, x.rank) for x in found] == [
        (x.token_id, x.rank) for x in whole.logprobs[10:]
    ]
    assert [x.logprob for x in found] == pytest.approx(
        [x.logprob for x in whole.logprobs[10:]], abs=1e-4
    )
    (anew,) = run(relay, checked(relay, params), {0: History()}).values()
    assert [one.token_id for one in anew[0].prompt_logprobs[1:]] == result.prompt_token_ids[1:]


def test_a_request_that_has_not_begun_is_forgotten(engine: Engine, relay: RelayEngine) -> None:
    params = replace(WAYS["greedy"], n=2)
    request = checked(relay, params)
    relay.add(request, {0: History(), 1: History()})
    assert relay.load().num_sequences == 2
    assert relay.withdraw(request.request_id)
    assert not relay.has_work
    assert relay.load().num_sequences == 0
    assert not relay.withdraw(request.request_id)
    assert relay.abort(request.request_id) == []
    # It may come back.
    found = run(relay, request, {0: History(), 1: History()})
    expected = engine.generate(PROMPT, WAYS["greedy"])[0].outputs[0].token_ids
    assert [told(found[i])[0] for i in (0, 1)] == [expected, expected]


def test_a_request_that_has_begun_is_kept(engine: Engine, relay: RelayEngine) -> None:
    expected = engine.generate(PROMPT, WAYS["greedy"])[0].outputs[0].token_ids
    request = checked(relay, WAYS["greedy"])
    relay.add(request, {0: History()})
    news = relay.step().deltas
    assert told(news)[0] == expected[:1]
    assert not relay.withdraw(request.request_id)
    while relay.has_work:
        news += relay.step().deltas
    assert told(news)[0] == expected
    # Nor is one that began elsewhere, though nothing of it ran here.
    relay.add(request, {0: history(expected[:5])})
    assert not relay.withdraw(request.request_id)
    assert [delta.finish_reason for delta in relay.abort(request.request_id)] == [
        FinishReason.ABORT
    ]


def test_a_request_whose_client_has_all_ends_as_others_do(relay: RelayEngine) -> None:
    request = checked(relay, WAYS["greedy"], PATIENT)
    relay.add(request, {0: History()})
    relay.step()
    (end,) = relay.complete(request.request_id)
    assert (end.finish_reason, end.error) == (FinishReason.STOP, None)
    assert end.slo is not None  # the promise is judged, as at other ends
    assert not relay.has_work


def test_an_unknown_request_is_neither_withdrawn_nor_aborted(relay: RelayEngine) -> None:
    assert not relay.withdraw("nobody")
    assert relay.abort("nobody") == []


GREEDY = WAYS["greedy"]
UNFIT: dict[str, tuple[dict[str, Any], dict[int, History]]] = {
    "prompt beyond the vocabulary": ({"prompt_token_ids": (5, 512)}, {0: History()}),
    "negative prompt token": ({"prompt_token_ids": (5, -1)}, {0: History()}),
    "no prompt": ({"prompt_token_ids": ()}, {0: History()}),
    "history beyond the vocabulary": ({}, {0: history([5, 512])}),
    "negative token in a history": ({}, {0: history([5, -1])}),
    "stop token beyond the vocabulary": ({"stop_token_ids": frozenset({512})}, {0: History()}),
    "bias beyond the vocabulary": (
        {"params": replace(GREEDY, logit_bias={512: 1.0})},
        {0: History()},
    ),
    "allowed token beyond the vocabulary": (
        {"params": replace(GREEDY, allowed_token_ids=(512,))},
        {0: History()},
    ),
    "bad word beyond the vocabulary": ({"bad_word_ids": ((5, 512),)}, {0: History()}),
    "too long": ({"prompt_token_ids": (5,) * 489}, {0: History()}),
    "without a length": ({"params": replace(GREEDY, max_tokens=None)}, {0: History()}),
    "index beyond n": ({}, {1: History()}),
    "index far beyond n": ({"params": replace(GREEDY, n=2)}, {0: History(), MAX_N: History()}),
    "negative index": ({}, {-1: History()}),
    "no histories": ({}, {}),
    "ended already": ({}, {0: history([5] * LENGTH)}),
    "times that are missing": ({}, {0: History((5, 6), (1.0,))}),
}


@pytest.mark.parametrize("what", UNFIT)
def test_a_request_that_does_not_fit_is_refused_and_leaves_nothing_behind(
    relay: RelayEngine, what: str
) -> None:
    changes, histories = UNFIT[what]
    request = replace(checked(relay, GREEDY), **changes)
    with pytest.raises(InvalidRequestError, match="another model"):
        relay.add(request, histories)
    assert not relay.has_work
    assert relay.load().num_sequences == 0


def test_the_longest_request_that_fits_is_served(relay: RelayEngine) -> None:
    request = replace(checked(relay, GREEDY), prompt_token_ids=(5,) * 488)
    found = run(relay, request, {0: history([6] * (LENGTH - 1))})
    assert len(told(found[0])[0]) == 1


def resumed_report(relay: RelayEngine, first_s: float, slo: SLO = PATIENT) -> SLOReport:
    """What is reported of an output that came in 10 s ago, had its first token after so many
    seconds and four more by steps of 0.1 s. All others come now, for the clock stands still.
    """
    now = relay.clock_s
    relay._core.clock = lambda: now
    arrival_s = now - 10.0
    request = replace(checked(relay, GREEDY, slo), arrival_s=arrival_s)
    times = tuple(arrival_s + first_s + 0.1 * i for i in range(5))
    (deltas,) = run(relay, request, {0: History((5, 6, 7, 8, 9), times)}).values()
    assert all(delta.slo is None for delta in deltas[:-1])
    return deltas[-1].slo


def test_the_first_token_was_on_time_though_it_came_from_elsewhere(relay: RelayEngine) -> None:
    found = resumed_report(relay, 0.5)
    assert found.ttft_s == pytest.approx(0.5)
    assert (found.attained, found.outcome) == (True, Outcome.ATTAINED)
    # The break between the replicas counts: the last token came 9.5 s after the first.
    assert found.mean_tpot_s == pytest.approx(9.5 / (LENGTH - 1))


def test_a_first_token_that_was_late_elsewhere_stays_late(relay: RelayEngine) -> None:
    found = resumed_report(relay, 1.5)
    assert found.ttft_s == pytest.approx(1.5)
    assert not found.attained


def test_the_wait_for_another_replica_may_break_the_pace(relay: RelayEngine) -> None:
    found = resumed_report(relay, 0.5, SLO(ttft=1.0, tpot=0.2))
    # Token 6 was due 1 s after the first, and came 9.5 s after it.
    assert found.worst_token_lateness_s == pytest.approx(8.5)
    assert not found.attained
    assert not found.attained_mean


def test_what_was_counted_where_it_began_is_not_counted_again(relay: RelayEngine) -> None:
    before = relay.snapshot()
    resumed_report(relay, 0.5)
    after = relay.snapshot()
    for name in ("ttft_s", "queue_s"):
        assert getattr(after, name).counts == getattr(before, name).counts, name
    assert after.num_prompt_tokens == before.num_prompt_tokens
    assert after.num_generation_tokens == before.num_generation_tokens + LENGTH - 5
    outcomes = {outcome: after.slo_requests["custom", outcome] for outcome in Outcome}
    outcomes[Outcome.ATTAINED] -= 1
    assert outcomes == {o: before.slo_requests["custom", o] for o in Outcome}
    # Its tokens here came between others.
    assert sum(after.inter_token_s.counts) == sum(before.inter_token_s.counts) + LENGTH - 5


def test_a_resumed_output_is_promised_its_pace_again(tiny_llama_dir: Path) -> None:
    relay = RelayEngine(str(tiny_llama_dir), executor="simulated", profile="opt-6.7b-a100")
    found = resumed_report(relay, 0.5)
    assert (found.admitted, found.attained, found.outcome) == (True, True, Outcome.ATTAINED)
    late = resumed_report(relay, 1.5)
    assert (late.admitted, late.attained) == (False, False)
