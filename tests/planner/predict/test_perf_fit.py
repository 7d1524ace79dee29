"""The fit against models that are known: coefficients come back from noisy samples."""

from __future__ import annotations

from dataclasses import astuple, replace

import numpy as np
import pytest

from minserve.errors import ProfileError
from minserve.planner.predict.perf_fit import MIN_SAMPLES, ProfileSample, evaluate, fit
from minserve.planner.predict.perf_model import BatchShape, PerfModel, Piece

# Published coefficients of SLOs-Serve (arXiv 2504.08784) and its code.
OPT_6B_A100 = (Piece(6.878e-5, base=0.02480), Piece(7.523e-5, base=0.003033))
OPT_13B_H100 = (Piece(4.177e-5, base=0.02743),)
QWEN_7B_A100 = (Piece(5.1e-5, seqs=1.69e-5, context_tokens=8e-8, base=0.014),)
# A GPU: flat while the weights are read, then steep; and a CPU with costly attention.
ROOFLINE = (Piece(1e-6, context_tokens=1e-8, base=0.012), Piece(6e-5, seqs=1e-5, base=0.001))
CPU = (Piece(2e-3, 1e-3, 8e-6, 8e-7, base=0.03),)


def shapes(count: int, seed: int, most_tokens: int = 4096) -> list[BatchShape]:
    """Decodes and mixes of decodes with a prefill chunk, log-uniform."""
    rng = np.random.default_rng(seed)

    def between(low: int, high: int) -> int:
        return int(np.exp(rng.uniform(np.log(low), np.log(high))))

    found = []
    for _ in range(count):
        chunks = [(between(16, 4096), 1)] * between(1, 128)
        if rng.random() < 0.6:
            start = between(1, 2048) if rng.random() < 0.5 else 0
            chunks.append((start, between(16, most_tokens)))
        found.append(BatchShape.of(chunks))
    return found


def samples(
    pieces: tuple[Piece, ...], some: list[BatchShape], *, noise: float = 0.0, outliers: float = 0.0
) -> list[ProfileSample]:
    """What a device with these pieces would measure; outliers take three times as long."""
    rng = np.random.default_rng(0)
    seconds = np.array([PerfModel(pieces).profiled(shape) for shape in some])
    seconds *= np.exp(rng.normal(0, noise, len(some)))
    seconds[rng.permutation(len(some))[: round(outliers * len(some))]] *= 3
    return [ProfileSample(shape, float(s)) for shape, s in zip(some, seconds, strict=True)]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "pieces",
    [OPT_6B_A100, OPT_13B_H100, QWEN_7B_A100, ROOFLINE, CPU],
    ids=["opt-6.7b a100", "opt-13b h100", "qwen-7b a100", "roofline", "cpu"],
)
def test_a_known_model_comes_back_from_noise_and_outliers(
    pieces: tuple[Piece, ...], seed: int
) -> None:
    noisy = samples(pieces, shapes(100, seed), noise=0.03, outliers=0.05)
    model = fit(noisy)
    quality = evaluate(model, samples(pieces, shapes(300, seed + 100)))
    assert quality.r2 > 0.99
    assert quality.mape < 0.02
    assert quality.p90_error < 0.05
    assert all(c >= 0 for piece in model.pieces for c in astuple(piece))


def test_coefficients_of_a_single_piece_are_those_of_the_device() -> None:
    (device,) = CPU
    (found,) = fit(samples(CPU, shapes(100, 5), noise=0.02, outliers=0.05)).pieces
    assert found.tokens == pytest.approx(device.tokens, rel=0.05)
    assert found.context_tokens == pytest.approx(device.context_tokens, rel=0.1)
    assert found.attention_pairs == pytest.approx(device.attention_pairs, rel=0.1)
    assert found.base == pytest.approx(device.base, rel=0.1)


def test_as_many_pieces_as_the_device_has() -> None:
    assert len(fit(samples(ROOFLINE, shapes(100, 1), noise=0.03)).pieces) == 2
    assert len(fit(samples(CPU, shapes(100, 1), noise=0.03)).pieces) == 1
    assert len(fit(samples(ROOFLINE, shapes(100, 1), noise=0.03), max_pieces=1).pieces) == 1


def test_draft_steps_are_told_from_tokens() -> None:
    device = (Piece(7.2e-5, draft_steps=3.3e-3, base=0.0317),)
    some = [replace(shape, draft_steps=i % 6) for i, shape in enumerate(shapes(60, 3))]
    (found,) = fit(samples(device, some, noise=0.02)).pieces
    assert found.draft_steps == pytest.approx(3.3e-3, rel=0.1)


@pytest.mark.parametrize(
    "some",
    [
        [BatchShape.of([(0, n)]) for n in range(16, 512, 16)],  # one sequence, no context
        [BatchShape.of([(64, 1)] * n) for n in range(1, 65)],  # tokens, sequences, context alike
        [BatchShape(tokens=n) for n in range(1, 40)],
    ],
    ids=["prefills", "equal decodes", "tokens alone"],
)
def test_features_that_never_vary_on_their_own_do_no_harm(some: list[BatchShape]) -> None:
    model = fit(samples(CPU, some, noise=0.01))
    assert evaluate(model, samples(CPU, some)).mape < 0.02
    assert all(np.isfinite(astuple(piece)).all() for piece in model.pieces)


def test_a_device_that_does_not_slow_down_can_still_be_inverted() -> None:
    model = fit([ProfileSample(shape, 0.01) for shape in shapes(30, 0)])
    assert model.profiled(BatchShape.of([(0, 64)])) == pytest.approx(0.01, rel=1e-3)
    assert model.max_tokens_within(0.1, BatchShape()) > 1000


def test_the_margin_covers_nine_of_ten_samples() -> None:
    noisy = samples(CPU, shapes(100, 2), noise=0.1)
    model = fit(noisy)
    covered = [s.seconds <= model.margin * model.profiled(s.shape) * (1 + 1e-9) for s in noisy]
    assert sum(covered) == 90
    assert model.margin > 1.05


def test_the_same_samples_give_the_same_model() -> None:
    noisy = samples(ROOFLINE, shapes(60, 4), noise=0.05, outliers=0.05)
    assert fit(noisy).to_dict() == fit(noisy).to_dict()


def test_quality_counts_what_it_says() -> None:
    model = PerfModel([Piece(0.1)])
    three = [ProfileSample(BatchShape(tokens=n), s) for n, s in ((10, 1.0), (20, 2.5), (40, 3.2))]
    quality = evaluate(model, three)  # predictions 1, 2 and 4
    assert quality.num_samples == 3
    assert quality.mape == pytest.approx((0 + 0.2 + 0.25) / 3)
    assert quality.p50_error == pytest.approx(0.2)
    mean = (1.0 + 2.5 + 3.2) / 3
    spread = (1.0 - mean) ** 2 + (2.5 - mean) ** 2 + (3.2 - mean) ** 2
    assert quality.r2 == pytest.approx(1 - (0.5**2 + 0.8**2) / spread)


def test_too_few_or_impossible_samples_are_refused() -> None:
    few = samples(CPU, shapes(MIN_SAMPLES, 0))
    fit(few)
    with pytest.raises(ProfileError, match="at least"):
        fit(few[1:])
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ProfileError, match="above 0"):
            fit([*few, ProfileSample(BatchShape(tokens=1), seconds)])
    with pytest.raises(ProfileError):
        evaluate(PerfModel(CPU), [])
