"""Counts, ratios, JSON and table of the speculation bench, and its synthetic mode end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from speculative import (
    CASES,
    EFFORTS,
    grouped,
    main,
    num_runs,
    parse,
)

from minserve.engine.speculation.proposal import Proposal
from minserve.outputs import CompletionOutput, TokenLogprob
from minserve.request import Request, Sequence
from minserve.sampling_params import SamplingParams
from parts.speculative.report import (
    BAR_WIDTH,
    SYNTHETIC,
    CaseResult,
    Counts,
    SpeculationCell,
    Tally,
    add_up,
    first_difference,
    histogram,
    pooled,
    summary,
    table,
)
from parts.speculative.runs import _mismatch
from parts.speculative.synthetic import SyntheticSampler

WITHOUT = Counts(tokens=100, seconds=10.0, passes=100, iterations=100)
WITH = Counts(
    tokens=100,
    seconds=5.0,
    passes=40,
    iterations=40,
    speculated=30,
    num_drafts=30,
    drafted=(30, 20, 10),
    accepted=(24, 10, 1),
)


def cell(batch: int = 1, lengths: str = "adaptive", with_: Counts = WITH) -> SpeculationCell:
    slower = Counts(tokens=100, seconds=8.0, passes=100, iterations=100)
    return SpeculationCell(
        batch=batch,
        lengths=lengths,
        pairs=[(with_, WITHOUT), (with_, slower), (with_, WITHOUT)],
        identical=1.0,
    )


def result(name: str = "a", **kw) -> CaseResult:
    return CaseResult(name=name, cells=kw.pop("cells", [cell()]), **kw)


def test_counts():
    assert WITH.rate == 20.0
    assert WITH.tokens_per_step == 2.5
    assert WITH.acceptance == 35 / 60
    assert WITH.by_position == [0.8, 0.5, 0.1]
    assert WITH.mean_length == 2.0
    assert WITH.speculated_share == 0.75


def test_counts_of_a_run_that_never_speculated_are_unknown_not_zero():
    assert WITHOUT.acceptance is None
    assert WITHOUT.mean_length is None
    assert WITHOUT.by_position == []
    assert WITHOUT.speculated_share == 0.0
    assert Counts().tokens_per_step is None


def test_pooled_counts_add_up_place_by_place():
    both = pooled([WITH, Counts(tokens=1, seconds=1.0, drafted=(1,), accepted=(0,))])
    assert both.tokens == 101
    assert both.seconds == 6.0
    assert both.drafted == (31, 20, 10)
    assert both.accepted == (24, 10, 1)
    assert pooled([]) == Counts()
    assert add_up([[1, 2], [], [3]]) == [4, 2]


def test_tally_counts_what_was_drafted_at_each_place():
    tally = Tally()
    for drafted, accepted in ((3, 1), (1, 1), (2, 0)):
        tally.add(drafted, accepted)
    assert tally.num_drafts == 3
    assert tally.num_draft_tokens == 6
    assert tally.num_accepted_tokens == 2
    assert tally.num_drafted_per_pos == [3, 2, 1]
    assert tally.num_accepted_per_pos == [2, 0, 0]


def test_the_speed_ratio_is_the_median_of_paired_rounds():
    assert cell().ratios == pytest.approx([2.0, 1.6, 2.0])
    assert cell().speedup == pytest.approx(2.0)
    told = cell().to_dict()
    assert (told["speedup_min"], told["speedup_max"]) == (1.6, 2.0)
    assert told["tokens_per_s"] == 20.0


@pytest.mark.parametrize(
    ("one", "other", "place"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1], 1), ([], [1], 0), ([], [], None)],
)
def test_first_difference(one: list[int], other: list[int], place: int | None):
    assert first_difference(one, other) == place


def test_histogram_is_drawn_to_scale():
    full, half, none = histogram([1.0, 0.5, 0.0])
    assert full.count("#") == BAR_WIDTH
    assert half.count("#") == BAR_WIDTH // 2
    assert none.count("#") == 0
    assert half.startswith("  2 ")
    assert half.endswith(" 50.0%")


def test_json_line():
    cells = [cell(1), cell(4), cell(1, "fixed 3")]
    results = [result(cells=cells, lossless=True), CaseResult(name="b", missing="no such model")]
    line = json.loads(json.dumps(summary(results, "a CPU", quick=True)))
    assert line["lossless"] is True
    assert line["device"] == "a CPU"
    assert line["quick"] is True
    assert "synthetic" not in line
    assert line["cases"]["b"] == {"missing": "no such model"}
    case = line["cases"]["a"]
    assert case["acceptance"] == pytest.approx(35 / 60, abs=1e-4)
    assert case["acceptance_from"] == "adaptive"
    assert case["acceptance_by_position"] == [0.8, 0.5, 0.1]
    assert case["speedup"] == 2.0
    assert case["tokens_per_step"] == 2.5
    assert list(case["by_batch"]) == ["1", "4"]
    assert case["fixed"]["length"] == 3
    assert list(case["fixed"]["by_batch"]) == ["1"]


@pytest.mark.parametrize(
    ("each", "expected"),
    [
        ([True, True], True),
        ([True, False], False),
        ([True, None], False),
        ([None, None], None),
        ([], None),
    ],
)
def test_lossless_needs_every_case_that_ran(each: list[bool | None], expected: bool | None):
    results = [result(str(i), lossless=one) for i, one in enumerate(each)]
    assert summary(results, "a CPU", quick=False)["lossless"] is expected


def test_where_nothing_paid_acceptance_is_that_of_the_check():
    idle = result(cells=[cell(with_=WITHOUT)], forced=WITH, lossless=True)
    told = idle.to_dict()
    assert told["acceptance_from"] == "check"
    assert told["acceptance_by_position"] == [0.8, 0.5, 0.1]
    assert told["by_batch"]["1"]["acceptance"] is None
    assert any("of the lossless check" in line for line in table([idle]))


def test_every_line_of_a_synthetic_table_says_so():
    lines = table([result(synthetic=True)])
    assert all(line.startswith(SYNTHETIC) for line in lines)
    assert not any(line.startswith(SYNTHETIC) for line in table([result()]))
    assert summary([result(synthetic=True)], "a CPU", quick=False)["synthetic"] is True


def test_a_missing_case_is_told_with_its_reason():
    assert "b: missing, no such model" in table([CaseResult(name="b", missing="no such model")])


def test_groups_of_prompts():
    assert grouped("abcd", 1, 2) == [["a"], ["b"]]
    assert grouped("abcd", 3, 2) == [["a", "b", "c"]]


def test_the_progress_bar_counts_runs_of_both_engines():
    effort = replace(EFFORTS["tiny", True], rounds={1: 4, 4: 5}, lone_prompts=2)
    assert num_runs(CASES[:1], effort, parse([])) == 2 * (4 * 2 + 5)
    assert num_runs(CASES[:1], effort, parse(["--fixed", "2"])) == 4 * (4 * 2 + 5)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--only", "nothing"],
        ["--batch-sizes", "0"],
        ["--fixed", "0"],
        ["--synthetic-acceptance", "1.5"],
        ["--synthetic-acceptance", "0.5", "--draft-shape", "llama-3.2-1b"],
    ],
)
def test_wrong_arguments_are_refused(wrong: list[str]):
    with pytest.raises(SystemExit):
        parse(wrong)


@pytest.mark.parametrize("rate", [0.0, 0.7, 1.0])
def test_synthetic_acceptance_is_what_was_asked_for(rate: float):
    # The target's own choice is 7, so that none of the drafts would be accepted.
    sampler, logits = SyntheticSampler(rate), torch.eye(9)[[7] * 4]
    length, accepted = 3, [0, 0, 0]
    for seed in range(400):
        request = Request(
            request_id=str(seed),
            prompt_token_ids=(1,),
            params=SamplingParams(temperature=0.0, seed=seed),
            seed=seed,
            arrival_s=0.0,
        )
        launched = sampler.launch(logits, [Sequence(request)], [Proposal((4, 5, 6))])
        (found,) = launched.results()
        assert [token.token_id for token in found.tokens] == [*[4, 5, 6][: found.num_accepted], 7]
        for place in range(found.num_accepted):
            accepted[place] += 1
    expected = [rate ** (place + 1) for place in range(length)]
    assert [count / 400 for count in accepted] == pytest.approx(expected, abs=0.08)


def test_synthetic_mode_on_the_tiny_shape(capsys: pytest.CaptureFixture[str]):
    code = main(
        ["--synthetic-acceptance", "1", "--target-shape", "tiny", "--draft-shape", "tiny",
         "--quick", "--batch-sizes", "1", "2", "--fixed", "3", "--device", "cpu"]
    )  # fmt: skip
    *lines, last = capsys.readouterr().out.splitlines()
    assert code == 0
    assert all(line.startswith(SYNTHETIC) for line in lines)
    told = json.loads(last)
    assert told["synthetic"] is True
    assert told["lossless"] is None
    case = told["cases"]["tiny+tiny@1"]
    assert case["synthetic"] is True
    assert set(case["by_batch"]) == {"1", "2"}
    fixed = case["fixed"]["by_batch"]["1"]
    # 23 tokens behind the first: five times 3 drafts and one more, then 2 and 1 more.
    assert fixed["acceptance"] == 1.0
    assert fixed["tokens_per_step"] == pytest.approx(23 / 6, abs=1e-3)
    assert fixed["mean_length"] == pytest.approx(17 / 6, abs=1e-3)
    assert fixed["speculated_share"] == 1.0


def test_plot_is_written(tmp_path: Path):
    from parts.speculative.report import plot

    plot([result(cells=[cell(1), cell(4)])], str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_changed_outputs_end_in_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def broken(_args, results, _devices):
        results["a"] = result(lossless=False)

    monkeypatch.setattr("speculative.bench_real", broken)
    assert main([]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["lossless"] is False


def test_an_interrupted_run_tells_what_it_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupted(_args, results, _devices):
        results["a"] = result()
        raise KeyboardInterrupt

    monkeypatch.setattr("speculative.bench_real", interrupted)
    assert main([]) == 130
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["interrupted"] is True
    assert told["cases"]["a"]["speedup"] == 2.0


def test_a_mismatch_names_the_position_and_both_log_probabilities():
    def output(*tokens: tuple[int, float]) -> CompletionOutput:
        logprobs = [TokenLogprob(token, logprob, 1) for token, logprob in tokens]
        return CompletionOutput(index=0, token_ids=[t for t, _ in tokens], logprobs=logprobs)

    expected = output((5, -0.1), (6, -0.5))
    assert _mismatch(expected, expected) is None
    text = _mismatch(output((5, -0.1), (7, -0.6)), expected)
    assert "position 1" in text
    assert "7 (logprob -0.600000)" in text
    assert "6 (logprob -0.500000)" in text
    assert "nothing with" in _mismatch(output((5, -0.1)), expected)
