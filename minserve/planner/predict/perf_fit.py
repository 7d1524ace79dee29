"""`fit` makes a `PerfModel` from measured batches; `evaluate` says how well it predicts others.

The maximum of linear pieces is fitted by the least-squares partition algorithm (Magnani and Boyd,
"Convex piecewise-linear fitting", Optimization and Engineering 10, 2009): fit a piece to each part
of the samples, give every sample to the piece that is largest there, repeat, from several starts. A
piece is fitted by iteratively reweighted non-negative least squares with Huber's weights (Huber,
"Robust estimation of a location parameter", 1964) on relative residuals, so that small batches
count as much as large ones and outliers little.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import astuple, dataclass, fields
from functools import cache
from statistics import mean

import numpy as np
from numpy.typing import NDArray

from minserve.errors import ProfileError
from minserve.planner.predict.perf_model import (
    MARGIN_QUANTILE,
    BatchShape,
    PerfModel,
    Piece,
    residual_quantile,
)

Floats = NDArray[np.float64]

NUM_FEATURES = len(fields(Piece))  # the fields of `BatchShape`, and 1
# At least as many as the features that vary in a profile: those of drafts are measured apart.
MIN_SAMPLES = 7
# More pieces are only looked for where each would have twice as many samples as coefficients.
SAMPLES_PER_PIECE = 2 * MIN_SAMPLES
FOLDS = 4
SIGNIFICANT = 2.0  # standard errors
RESTARTS = 6
PARTITION_ROUNDS = 12
REWEIGHTINGS = 5
# Huber's constant: 95% as efficient as least squares where all noise is Gaussian.
HUBER_K = 1.345
MAD_TO_SIGMA = 1.4826
# Keeps the normal equations solvable where features are collinear.
RIDGE = 1e-9
TINY = 1e-9
# Repeats this much slower than the fastest count as undisturbed.
AGREEMENT = 1.15
# A model must grow with the tokens to be inverted; no device is faster than this.
LEAST_TOKEN_S = 1e-9


@dataclass(frozen=True, slots=True)
class ProfileSample:
    """A batch and the seconds that it took."""

    shape: BatchShape
    seconds: float


@dataclass(frozen=True, slots=True)
class FitQuality:
    """The errors of a model's predictions; an error is ``|predicted / measured - 1|``.

    Attributes:
        r2: coefficient of determination of the seconds; NaN if all samples took equally long.
        mape: mean error.
        p50_error, p90_error, p99_error: quantiles of the error.
        num_samples: number of samples that were predicted.
    """

    r2: float
    mape: float
    p50_error: float
    p90_error: float
    p99_error: float
    num_samples: int


def undisturbed(runs: SequenceOf[float]) -> float:
    """Return the mean seconds of those repeats of a batch that are about as fast as the fastest.

    Other work on the machine only ever adds time, and often to most of a few repeats of a batch, so
    that their median would contain it.
    """
    fastest = min(runs)
    return mean(run for run in runs if run <= AGREEMENT * fastest)


def agree(runs: SequenceOf[float]) -> bool:
    """Return True if the two fastest repeats of a batch took about as long."""
    return len(runs) > 1 and sorted(runs)[1] <= AGREEMENT * min(runs)


def fit(
    samples: SequenceOf[ProfileSample],
    *,
    max_pieces: int = 2,
    poll: Callable[[], None] = lambda: None,
) -> PerfModel:
    """Return the model with the fewest pieces that predicts held-out samples as well as any.

    Its ``margin`` covers the `MARGIN_QUANTILE` of the samples. The result is deterministic.

    Args:
        samples: measured batches.
        max_pieces: the most pieces that the model may have.
        poll: function called every few milliseconds. An exception of it ends the fit, which takes
            up to a second for two pieces.

    Raises:
        ProfileError: for fewer than `MIN_SAMPLES` samples, or seconds that are not above 0.
    """
    if len(samples) < MIN_SAMPLES:
        raise ProfileError(
            f"a performance model needs at least {MIN_SAMPLES} measured batches, got {len(samples)}"
        )
    features, seconds = _arrays(samples)
    if not (np.isfinite(seconds).all() and (seconds > 0).all()):
        raise ProfileError("measured seconds must be finite and above 0")
    used = features.any(axis=0)
    # Rows are divided by their seconds: every target is 1 and residuals are relative.
    rows = features[:, used] / seconds[:, None]
    scale = rows.max(axis=0)
    rows /= scale
    most = max(1, min(max_pieces, len(samples) // SAMPLES_PER_PIECE))
    found = _fit_pieces(rows, _choose_num_pieces(rows, most, poll), poll) / scale
    coefficients = np.zeros((len(found), NUM_FEATURES))
    coefficients[:, used] = found
    if not (coefficients[:, 0] > 0).any():
        coefficients[0, 0] = LEAST_TOKEN_S
    pieces = [Piece(*map(float, row)) for row in coefficients]
    ratios = seconds / (features @ coefficients.T).max(axis=1)
    return PerfModel(pieces, margin=max(1.0, residual_quantile(ratios.tolist(), MARGIN_QUANTILE)))


def evaluate(model: PerfModel, samples: SequenceOf[ProfileSample]) -> FitQuality:
    """Return how well the model, without its online correction, predicts the samples.

    Raises:
        ProfileError: if there is no sample.
    """
    if not samples:
        raise ProfileError("no samples to evaluate a performance model on")
    measured = np.array([s.seconds for s in samples])
    predicted = np.array([model.profiled(s.shape) for s in samples])
    errors = np.abs(predicted / measured - 1)
    spread = np.square(measured - measured.mean()).sum()
    p50, p90, p99 = (float(q) for q in np.quantile(errors, (0.5, 0.9, 0.99)))
    return FitQuality(
        r2=float(1 - np.square(measured - predicted).sum() / spread)
        if spread > 0
        else float("nan"),
        mape=float(errors.mean()),
        p50_error=p50,
        p90_error=p90,
        p99_error=p99,
        num_samples=len(samples),
    )


def _arrays(samples: SequenceOf[ProfileSample]) -> tuple[Floats, Floats]:
    """Return the features ``[n, NUM_FEATURES]``, in the order of `Piece`'s fields, and the seconds
    ``[n]``.
    """
    features = np.array([(*astuple(s.shape), 1.0) for s in samples], dtype=np.float64)
    return features, np.array([s.seconds for s in samples], dtype=np.float64)


def _choose_num_pieces(rows: Floats, max_pieces: int, poll: Callable[[], None]) -> int:
    """Choose by cross-validation the fewest pieces that are no worse than the best, within noise.

    Noise is measured in standard errors as in Breiman et al., "Classification and Regression Trees"
    (1984); here it is that of the difference, since all candidates predict the same samples.
    """
    if max_pieces == 1:
        return 1
    folds = np.random.default_rng(0).permutation(len(rows)) % FOLDS
    errors = np.empty((max_pieces, len(rows)))
    for k in range(1, max_pieces + 1):
        for fold in range(FOLDS):
            out = folds == fold
            coefficients = _fit_pieces(rows[~out], k, poll)
            errors[k - 1, out] = _errors(rows[out], coefficients)
    worse = errors - errors[errors.mean(axis=1).argmin()]
    noise = worse.std(axis=1) / np.sqrt(len(rows))
    return 1 + int(np.argmax(worse.mean(axis=1) <= SIGNIFICANT * noise))


def _fit_pieces(rows: Floats, num_pieces: int, poll: Callable[[], None]) -> Floats:
    """Fit pieces by least-squares partition; return ``[at most num_pieces, features]``
    coefficients.
    """
    whole = _fit_piece(rows)[None]
    best, least = whole, _errors(rows, whole).mean()
    if num_pieces == 1:
        return best
    rng = np.random.default_rng(0)
    for _ in range(RESTARTS):
        centres = rows[rng.choice(len(rows), num_pieces, replace=False)]
        part = np.square(rows[:, None] - centres).sum(axis=2).argmin(axis=1)
        for _ in range(PARTITION_ROUNDS):
            poll()
            pieces = np.stack([_fit_piece(rows[part == p]) for p in np.unique(part)])
            error = _errors(rows, pieces).mean()
            if error < least:
                best, least = pieces, error
            before, part = part, (rows @ pieces.T).argmax(axis=1)
            if (part == before).all():
                break
    return best


def _errors(rows: Floats, pieces: Floats) -> Floats:
    """Return the relative error of each row."""
    return np.abs(1 - (rows @ pieces.T).max(axis=1))


def _fit_piece(rows: Floats) -> Floats:
    """Return coefficients >= 0 with ``rows @ coefficients`` near 1; outliers weigh little."""
    weights = np.ones(len(rows))
    for _ in range(REWEIGHTINGS):
        weighted = rows * weights[:, None]
        coefficients = _non_negative(rows.T @ weighted, weighted.sum(axis=0))
        residuals = np.abs(1 - rows @ coefficients)
        bound = max(HUBER_K * MAD_TO_SIGMA * float(np.median(residuals)), TINY)
        weights = bound / np.maximum(residuals, bound)
    return coefficients


def _non_negative(gram: Floats, moment: Floats) -> Floats:
    """Return the c >= 0 that minimizes ``c gram c - 2 moment c``, exactly.

    There are so few features that the equations of every subset can be solved and the best feasible
    solution taken.
    """
    subsets = _subsets(len(moment))
    gram = gram + RIDGE * gram.trace() * np.eye(len(moment))
    both = subsets[:, :, None] & subsets[:, None, :]
    solutions = np.linalg.solve(
        np.where(both, gram, np.eye(len(moment))), np.where(subsets, moment, 0.0)[:, :, None]
    )[:, :, 0]
    # Where it is least, the cost is minus what the moments add up to.
    gains = solutions @ moment
    gains[(solutions < 0).any(axis=1)] = -np.inf
    return solutions[gains.argmax()]


@cache
def _subsets(count: int) -> NDArray[np.bool_]:
    """Return all subsets of so many features, ``[2 ** count, count]``."""
    return (np.arange(2**count)[:, None] >> np.arange(count)) % 2 == 1
