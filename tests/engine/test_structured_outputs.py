"""Outputs with a structure, from whole engines: always whole where they end by themselves, and the
same however they were run.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from relayed import intake_for
from speculating import PROMPTS, essence, make_engine, outputs_of, with_oracle

from minserve import AsyncEngine, Engine, SamplingParams
from minserve.engine.live_output import History
from minserve.engine.relay import RelayEngine
from minserve.errors import InvalidRequestError
from minserve.outputs import CompletionOutput
from minserve.request import FinishReason
from minserve.structure import Structure

SETTINGS: dict[str, Any] = {"dtype": "float32", "threads": 1, "token_budget": 64, "max_num_seqs": 16,
            "num_blocks": 80, "block_size": 8, "policy": "sarathi"}  # fmt: skip
# All its texts are short, so that outputs end by themselves.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "size": {"type": "integer", "minimum": -99, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", None]}, "maxItems": 2},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
}
# Models that know no JSON like spaces too well.
OBJECT = Structure(
    "lark", f"start: %json {json.dumps({**SCHEMA, 'x-guidance': {'whitespace_flexible': False}})}"
)
WORD = Structure("regex", "[a-z]{2,6}( [a-z]{2,6}){1,2}!")
NUMBERS = Structure("gbnf", 'root ::= "(" [0-9] ("," [0-9])? ")"')
LONG = 200
KINDS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=LONG, structure=OBJECT),
    "seeded": SamplingParams(seed=11, max_tokens=LONG, structure=OBJECT),
    "regex": SamplingParams(seed=3, max_tokens=LONG, top_p=0.9, structure=WORD),
    "grammar": SamplingParams(seed=4, max_tokens=LONG, structure=NUMBERS, repetition_penalty=1.3),
    "choice": SamplingParams(
        temperature=0.0, max_tokens=LONG, structure=Structure.of_choice(["self", "selfish", "no"])
    ),
    "behind a marker": SamplingParams(
        seed=5, max_tokens=LONG, structure=Structure.of_choice(["yes"], begins_after="e")
    ),
    "short": SamplingParams(seed=6, max_tokens=5, structure=OBJECT),
    "free": SamplingParams(seed=7, max_tokens=24),
}


@pytest.fixture(scope="module")
def engine(tiny_llama_dir: Path) -> Engine:
    return Engine(str(tiny_llama_dir), **SETTINGS)


def run(engine: Engine, prompt: str = "The quick", **settings: Any) -> CompletionOutput:
    (output,) = engine.generate(prompt, SamplingParams(**{"max_tokens": LONG, **settings}))[
        0
    ].outputs
    return output


def check(kind: str, output: CompletionOutput) -> None:
    """Check an output against the structure of its kind, by other means than those that held it."""
    text = output.text
    if kind == "short":
        assert output.finish_reason == FinishReason.LENGTH.value
        assert len(output.token_ids) == 5
    elif kind != "free":
        assert output.finish_reason == FinishReason.STOP.value
    match kind:
        case "greedy" | "seeded":
            jsonschema.validate(json.loads(text), SCHEMA)
        case "regex":
            assert re.fullmatch(WORD.source, text)
        case "grammar":
            assert re.fullmatch(r"\([0-9](,[0-9])?\)", text)
        case "choice":
            assert text in ("self", "selfish", "no")
        case "behind a marker":
            assert re.fullmatch(r"[^e]*e\s*yes", text)


# -- speculation -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tiny_llama_pair: Any) -> Engine:
    return make_engine(tiny_llama_pair)


@pytest.fixture(scope="module")
def expected(plain: Engine) -> dict[str, list[tuple]]:
    """What comes out without speculation, each prompt alone."""
    found: dict[str, list[tuple]] = {}
    for kind, params in KINDS.items():
        outputs = [one for prompt in PROMPTS for one in outputs_of(plain, [prompt], params)]
        for output in outputs:
            check(kind, output)
        found[kind] = essence(outputs)
    return found


@pytest.mark.parametrize("how", ["off", "draft", "ngram"])
def test_outputs_are_the_same_in_any_company_with_drafts_or_without(
    tiny_llama_pair: Any, expected: dict[str, list[tuple]], how: str
) -> None:
    engine = make_engine(tiny_llama_pair, how)
    cases = [(i, kind) for i in range(len(PROMPTS)) for kind in KINDS]
    prompts = [PROMPTS[i] for i, _ in cases]
    found = essence(outputs_of(engine, prompts, [KINDS[kind] for _, kind in cases]))
    assert found == [expected[kind][i] for i, kind in cases]
    if how != "off":
        assert engine.speculation_stats.num_accepted_tokens > 0


def test_the_draft_model_proposes_what_the_structure_allows(tiny_llama_pair: Any) -> None:
    """Else the wide vocabulary would leave next to nothing of its drafts."""
    engine = make_engine(tiny_llama_pair, "draft")
    outputs = outputs_of(engine, PROMPTS, KINDS["greedy"])
    assert sum(one.num_accepted_tokens for one in outputs) > 0.3 * sum(
        one.num_draft_tokens for one in outputs
    )


def test_drafts_that_break_the_structure_are_refused(
    tiny_llama_pair: Any, expected: dict[str, list[tuple]]
) -> None:
    """Also those that the model itself would have written without it."""
    engine = make_engine(tiny_llama_pair)
    free = engine.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=LONG // 2))
    prompts = [one.prompt_token_ids for one in free]
    with_oracle(engine, prompts, [one.outputs[0] for one in free])
    assert essence(outputs_of(engine, PROMPTS, KINDS["greedy"])) == expected["greedy"]
    right = engine.generate(PROMPTS, KINDS["greedy"])
    with_oracle(engine, prompts, [one.outputs[0] for one in right], errs_every=3)
    assert essence(outputs_of(engine, PROMPTS, KINDS["greedy"])) == expected["greedy"]
    assert engine.speculation_stats.num_accepted_tokens > 0


@pytest.mark.parametrize("how", ["draft", "ngram"])
def test_unseeded_outputs_hold_their_structure(tiny_llama_pair: Any, how: str) -> None:
    engine = make_engine(tiny_llama_pair, how)
    for kind in ("seeded", "regex", "grammar"):
        params = replace(KINDS[kind], seed=None, n=2)
        for output in outputs_of(engine, PROMPTS, params):
            check(kind, output)


# -- other ways to run ---------------------------------------------------------------------


def test_preempted_outputs_go_on_in_their_structure(tiny_llama_dir: Path, engine: Engine) -> None:
    params = SamplingParams(seed=3, n=6, max_tokens=60, structure=Structure("regex", "[a-z]{40}"))
    small = Engine(str(tiny_llama_dir), **{**SETTINGS, "num_blocks": 14, "policy": "fcfs"})
    prompt = "The quick brown fox jumps over"
    found, expected = (one.generate(prompt, params)[0].outputs for one in (small, engine))
    assert small._core.snapshot().num_preemptions > 0
    assert essence(found) == essence(expected)
    assert len({one.text for one in found}) == 6
    for output in found:
        assert re.fullmatch("[a-z]{40}", output.text)


@pytest.mark.parametrize("kind", ["greedy", "seeded", "behind a marker"])
@pytest.mark.parametrize("num_told", [1, 4])
def test_an_output_goes_on_elsewhere(
    tiny_llama_dir: Path, engine: Engine, kind: str, num_told: int
) -> None:
    """As on another replica, when its own is lost."""
    params = KINDS[kind]
    (whole,) = engine.generate("The quick", params)[0].outputs
    relay = RelayEngine(str(tiny_llama_dir), **SETTINGS)
    request = intake_for(relay).request("The quick", params)[1]
    told = History(tuple(whole.token_ids[:num_told]), (time.monotonic(),) * num_told)
    relay.add(request, {0: told})
    tokens, text, reason = list(told.token_ids), "", None
    while relay.has_work:
        for delta in relay.step().deltas:
            tokens += delta.token_ids
            text += delta.text
            reason = delta.finish_reason
    assert tokens == whole.token_ids
    assert whole.text.endswith(text)
    assert reason is FinishReason.STOP


def test_all_log_probabilities_are_the_models_own(engine: Engine) -> None:
    held = run(engine, temperature=0.0, structure=OBJECT, logprobs=1)
    assert held.logprobs is not None
    assert [one.token_id for one in held.logprobs] == held.token_ids
    assert any(one.rank > 1 for one in held.logprobs), "the structure has changed a choice"


# -- with other settings -------------------------------------------------------------------


def test_without_an_end_of_text_an_output_ends_where_nothing_may_follow(engine: Engine) -> None:
    output = run(engine, temperature=0.0, structure=OBJECT, ignore_eos=True)
    check("greedy", output)
    endless = run(engine, structure=Structure("regex", "[ab]+"), ignore_eos=True, max_tokens=40)
    assert re.fullmatch("[ab]+", endless.text)
    assert endless.finish_reason == FinishReason.LENGTH.value


def test_min_tokens_put_the_end_off_only_where_more_may_come(engine: Engine) -> None:
    short = run(engine, structure=Structure.of_choice(["no"]), min_tokens=30)
    assert (short.text, short.finish_reason) == ("no", FinishReason.STOP.value)
    for seed in range(4):
        long = run(
            engine, structure=Structure("regex", "[ab]+"), min_tokens=30, seed=seed, max_tokens=50
        )
        assert len(long.token_ids) >= 30


def test_stop_texts_and_tokens_end_an_output_where_it_is_whole(engine: Engine) -> None:
    for stop in ('"', "name", "{"):
        check("greedy", run(engine, temperature=0.0, structure=OBJECT, stop=(stop,)))
    (brace,) = engine.tokenizer.encode("}", add_special_tokens=False)
    check("greedy", run(engine, temperature=0.0, structure=OBJECT, stop_token_ids=(brace,)))
    free = run(engine, structure=Structure("regex", "[ab]+"), stop=("b",), seed=1)
    assert free.stop_reason == "b"
    assert re.fullmatch("a*", free.text)
    (b,) = engine.tokenizer.encode("b", add_special_tokens=False)
    token = run(engine, structure=Structure("regex", "[ab]+"), stop_token_ids=(b,), seed=1)
    assert re.fullmatch("[ab]+", token.text)
    assert token.token_ids[-1] == token.stop_reason == b


def test_settings_that_leave_no_token_end_the_output_with_an_error(engine: Engine) -> None:
    choice = Structure.of_choice(["the"])
    (x,) = engine.tokenizer.encode("x", add_special_tokens=False)
    for settings in ({"bad_words": ("t", "th", "the")}, {"allowed_token_ids": (x,)}):
        with pytest.raises(InvalidRequestError, match="leave no token") as caught:
            run(engine, structure=choice, **settings)
        assert caught.value.param in settings
    liked = run(engine, structure=choice, logit_bias={x: 100.0})
    assert liked.text == "the"
    ok = run(engine, structure=Structure("regex", "[a-z]{3}"), allowed_token_ids=(x,))
    assert ok.text == "xxx"


def test_a_structure_that_cannot_be_held_ends_its_request_alone(engine: Engine) -> None:
    for structure in (Structure("regex", "(a"), Structure.of_schema({"not": {}}, param="format")):
        with pytest.raises(InvalidRequestError) as caught:
            run(engine, structure=structure)
        assert caught.value.param == structure.param
    # With each letter there are many more ways to have come there.
    ways = "\n".join(f'x{i}: e e | "a"' for i in range(40))
    slow = f'start: e\ne: {" | ".join(f"x{i} e x{i}" for i in range(40))} | "a"\n{ways}'
    with pytest.raises(InvalidRequestError, match="cannot be held") as caught:
        run(engine, structure=Structure("lark", slow, param="grammar"), ignore_eos=True)
    assert caught.value.param == "grammar"
    assert engine._core.num_unfinished == 0
    engine._core.check_integrity()
    check("greedy", run(engine, temperature=0.0, structure=OBJECT))


def test_a_request_may_leave_while_its_structure_is_compiled(tiny_llama_dir: Path) -> None:
    async def leave() -> list[Any]:
        engine = AsyncEngine(str(tiny_llama_dir), **SETTINGS)
        await engine.start()
        try:
            params = [
                SamplingParams(structure=Structure("regex", f"[a-z]{{{i}}}")) for i in range(1, 9)
            ]
            handles = [engine.submit(["x"], one)[0] for one in params]
            for handle in handles[::2]:
                handle.abort()
            return [[delta async for delta in handle][-1] for handle in handles]
        finally:
            await engine.stop()

    last = asyncio.run(leave())
    assert [one.finish_reason for one in last[1::2]] == [FinishReason.STOP] * 4
    assert {one.finish_reason for one in last[::2]} <= {FinishReason.ABORT, FinishReason.STOP}
