"""What a kernel sweep is summed up to, and the sizes that its rates are computed from."""

from __future__ import annotations

import pytest
import torch

from parts.kernel_bench.attention import UniformBatch, attention_problem
from parts.kernel_bench.report import absent, failures, summary, table
from parts.kernel_bench.sweep import KERNELS, _rates, problems
from shared.kernel_cases import OURS, Heads, KernelSetting, Scale
from shared.kernel_timing import Ceilings, checked
from shared.synthetic_models import SHAPES, linear_weights

CPU = KernelSetting(torch.device("cpu"), torch.float32, cache_bytes=0)
CEILINGS = Ceilings(copy_gb_s=1000.0, matmul_tflop_s=100.0)
HEADS = Heads(num_heads=8, num_kv_heads=2, head_dim=16)


def batch(seqs: int, queries: int, past: int, *, decode: bool) -> UniformBatch:
    return UniformBatch(
        model="m", heads=HEADS, seqs=seqs, queries=queries, past=past, decode=decode
    )


def decode_row(share: float, **case: object) -> dict:
    case = {"model": "m", "batch": 64, "context": 2048, **case}
    results = {"ms": {OURS: [1, 1, 1]}, "failed": {}, "share": share, "bytes": 1}
    return {"kernel": "decode", **case, **results}


def prefill_row(chunk: int, ours_ms: float, sdpa_ms: float, **others: float) -> dict:
    ms = {OURS: [0, ours_ms, 0], "sdpa": [0, sdpa_ms, 0]}
    ms |= {name: [0, value, 0] for name, value in others.items()}
    return {"kernel": "prefill", "model": "m", "chunk": chunk, "past": 0, "ms": ms, "failed": {}}


def test_goals_are_the_worst_decode_and_the_worst_and_median_prefill():
    rows = [
        decode_row(0.95), decode_row(0.91), decode_row(0.1, context=512), decode_row(0.2, queries=5),
        decode_row(0.62, batch=1), decode_row(0.7, batch=1), decode_row(0.1, batch=1, context=512),
        prefill_row(512, 1.0, 1.1), prefill_row(2048, 1.0, 1.4), prefill_row(8192, 1.0, 1.2),
        prefill_row(128, 1.0, 0.5),
    ]  # fmt: skip
    told = summary(rows, CEILINGS)
    assert told["decode_share_b64_c2048"] == 0.91
    assert told["decode_share_b1_c2048"] == 0.62
    assert (told["prefill_vs_sdpa_min"], told["prefill_vs_sdpa_median"]) == (1.1, 1.2)
    assert told["goals_met"] is True
    assert summary([decode_row(0.89), *rows], CEILINGS)["goals_met"] is False
    assert summary([decode_row(0.59, batch=1), *rows], CEILINGS)["goals_met"] is False
    assert summary([prefill_row(512, 1.0, 0.9), *rows], CEILINGS)["goals_met"] is False
    for cudnn_ms, is_met in ((0.8, True), (0.7, False)):
        told = summary([prefill_row(512, 1.0, 1.1, cudnn=cudnn_ms), *rows], CEILINGS)
        assert (told["prefill_vs_cudnn_min"], told["goals_met"]) == (cudnn_ms, is_met)


def test_what_was_not_measured_is_null():
    assert summary([decode_row(0.9)], CEILINGS)["goals_met"] is None
    assert (
        summary([decode_row(0.9), prefill_row(512, 1, 2)], None)["decode_share_b64_c2048"] is None
    )


def test_a_kernel_of_our_own_that_failed_is_a_failure_and_a_competitor_is_absent():
    row = {**decode_row(0.9), "failed": {"flash-attn": "not installed"}}
    broken = {**decode_row(0.9), "ms": {}, "failed": {OURS: "wrong: relative error 0.5"}}
    assert failures([row]) == []
    assert absent([row, broken]) == {"flash-attn": "decode m batch 64 context 2048: not installed"}
    assert failures([broken]) == ["decode m batch 64 context 2048: wrong: relative error 0.5"]
    assert "failed" in table([row, broken]).splitlines()[2]


def test_bytes_and_flops_of_a_batch():
    decode = attention_problem(batch(3, 1, 9, decode=True), CPU)
    assert decode.least_bytes == 4 * 16 * (2 * 3 * 10 * 2 + 2 * 3 * 8)
    chunk = attention_problem(batch(1, 4, 2, decode=False), CPU)
    assert chunk.flops == 4 * 8 * 16 * (3 + 4 + 5 + 6)


def test_the_share_is_of_whichever_ceiling_is_nearer():
    problem = attention_problem(batch(3, 1, 9, decode=True), CPU)
    floor_ms = problem.least_bytes / 1e9
    rates = _rates(problem, 2 * floor_ms, CEILINGS)
    assert (rates["bound"], rates["share"]) == ("memory", 0.5)
    slow_matmul = CEILINGS._replace(matmul_tflop_s=1e-9)
    assert _rates(problem, 1e9, slow_matmul)["bound"] == "matmul"


@pytest.mark.parametrize("decode", [True, False])
def test_a_wrong_result_is_never_timed(decode: bool):
    problem = attention_problem(batch(2, 3, 5, decode=decode), CPU)
    contestant, expected = problem.contestants["torch"](), problem.expected()
    assert checked(contestant, expected, torch.float32) < 1e-5
    wrong = contestant._replace(result=lambda: contestant.result() * 1.01)
    with pytest.raises(RuntimeError, match=r"wrong: relative error 0\.01"):
        checked(wrong, expected, torch.float32)
    poisoned = contestant._replace(result=lambda: contestant.result().log())
    with pytest.raises(RuntimeError, match="wrong: relative error nan"):
        checked(poisoned, expected, torch.float32)


def test_a_full_sweep_begins_with_the_quick_one_and_repeats_nothing():
    def names(scale: Scale) -> list[str]:
        return [
            f"{make.args} {make.keywords} {kernel}" for kernel, make in problems(KERNELS, scale)
        ]

    full, quick = names(Scale.FULL), names(Scale.QUICK)
    assert full[: len(quick)] == quick
    assert len(set(full)) == len(full)


def test_inputs_are_rotated_until_no_cache_holds_them():
    setting = CPU._replace(cache_bytes=1000)
    assert [setting.num_sets(size) for size in (1, 100, 1000, 10**6)] == [64, 40, 4, 1]


def test_weights_of_a_step_are_those_of_the_published_models():
    billions = {name: round(linear_weights(name) / 1e9, 1) for name in SHAPES}
    assert billions["opt-6.7b"] == 6.6
    assert billions["llama-3.1-8b"] == 7.5
    assert billions["llama-3.1-70b"] == 69.5
