"""Texts of a workload: of their class, as long as they should be, and no two alike."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from minserve.slo.objectives import SLO, preset_classes
from minserve.workload.conversation import Conversation, Turn
from minserve.workload.data_files import read_prompts
from minserve.workload.scenarios import SCENARIOS, find_scenario
from minserve.workload.texts import BEGINNING, Count, estimate_tokens, fill


def count_words(text: str) -> int:
    """A tokenizer of words and single signs."""
    return len(re.findall(r"\w+|[^\w\s]", text))


@pytest.mark.parametrize("count", [estimate_tokens, count_words])
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_text_has_about_as_many_tokens_as_its_turn_and_no_more(name: str, count: Count) -> None:
    workload = fill(find_scenario(name).draw(1.0, seed=0, num_requests=60), count)
    wanted = found = 0
    for turn in (turn for one in workload for turn in one.turns):
        new = turn.prompt_tokens - turn.shared_tokens
        assert turn.text
        assert 1 <= count(turn.text) <= new
        assert count(turn.text) >= 0.8 * new - 8
        wanted, found = wanted + new, found + count(turn.text)
    assert found > 0.95 * wanted


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_two_texts_begin_alike(name: str) -> None:
    # More requests than there are prompts of the kind.
    workload = find_scenario(name).draw(1.0, seed=0, num_requests=700, texts=True)
    texts = [turn.text or "" for one in workload for turn in one.turns]
    beginnings = [
        " ".join(text.split()[:BEGINNING]) for text in texts if len(text.split()) > BEGINNING
    ]
    assert len(beginnings) > 300
    assert len(set(beginnings)) == len(beginnings)


def test_texts_are_of_the_kind_of_their_class() -> None:
    workload = find_scenario("mixed").draw(1.0, seed=0, num_requests=30, texts=True)
    sets = {
        "chatbot": "self_instruct_user",
        "coding": "humaneval",
        "summarization": "scitldr_abstracts_test",
    }
    for turn in (one.turns[0] for one in workload):
        real = " ".join(" ".join(read_prompts(sets[turn.slo.name])).split())
        words = (turn.text or "").split()[:5]
        assert " ".join(words) in real


def test_texts_differ_by_seed_and_only_by_it() -> None:
    workload = find_scenario("coding").draw(1.0, seed=0, num_requests=20)
    first, again, other = (fill(workload, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    bare = [
        Conversation(one.arrival_s, tuple(replace(turn, text=None) for turn in one.turns))
        for one in first
    ]
    assert bare == workload


def test_any_class_gets_a_text_however_short() -> None:
    turn = Turn(slo=SLO(ttft=1.0, name="mine"), prompt_tokens=1, output_tokens=1)
    many = fill([Conversation(0.0, (turn,))] * 100)
    assert all(1 <= len(one.turns[0].text or "") <= 4 for one in many)
    # A tokenizer that makes three tokens of every character.
    one = fill([Conversation(0.0, (turn,))], lambda text: 3 * len(text))
    assert len(one[0].turns[0].text or "") == 1


def test_more_texts_than_there_are_words_repeat_some() -> None:
    slo = preset_classes()["coding"]
    turn = Turn(slo=slo, prompt_tokens=12, output_tokens=1)
    many = fill([Conversation(0.0, (turn,))] * 12_000)
    assert 5000 < len({one.turns[0].text for one in many}) < 12_000


def test_a_text_longer_than_all_prompts_repeats_them() -> None:
    turn = Turn(slo=SLO(ttft=1.0, name="coding"), prompt_tokens=60_000, output_tokens=1)
    text = fill([Conversation(0.0, (turn,))])[0].turns[0].text
    assert 0.98 * 60_000 <= estimate_tokens(text or "") <= 60_000
