"""Arithmetic, table, JSON and plot of `speculative.py`, computed from finished runs.

Only the decode phase of a run counts. Runs come in pairs, with and without speculation over the
same prompts; the speed ratio of a pair is the ratio of their decode tokens per second.

Acceptance at a position is the share of all tokens drafted there that were accepted, which requires
that all tokens before them were. With adaptive lengths it need not fall: long proposals are made
for sequences whose drafts are accepted most.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from minserve.engine.speculation.proposer import SpeculationStats
from minserve.tables import text_table
from minserve.workload.plots import COLOURS, SLATE, figure_of

BAR_WIDTH = 30
SYNTHETIC = "SYNTHETIC "
# Okabe and Ito's colours, which colour-blind readers can tell apart; markers differ too.
MARKERS = "osD^vPX"


@dataclass(slots=True)
class Tally(SpeculationStats):
    """The engine's counts, and the number of proposals that reached each place.

    Lengths differ, so that the accepted tokens of a place say little without this number.

    Attributes:
        num_drafted_per_pos: tokens drafted at each place of a proposal.
    """

    num_drafted_per_pos: list[int] = field(default_factory=list)

    def add(self, num_drafted: int, num_accepted: int) -> None:
        """Count one verified proposal."""
        # With slots a class is made twice, so a super() without arguments finds the wrong one.
        SpeculationStats.add(self, num_drafted, num_accepted)
        self.num_drafted_per_pos = add_up([self.num_drafted_per_pos, [1] * num_drafted])


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """The counts of one run, or several, in the decode phase.

    Attributes:
        tokens: output tokens.
        seconds: time that they took.
        passes: forward passes of the target, counted once for each sequence in them.
        iterations: forward passes of the target.
        speculated: of these passes, those in which drafts were verified.
        num_drafts: number of proposals that were verified.
        drafted, accepted: tokens at each place of a proposal.
    """

    tokens: int = 0
    seconds: float = 0.0
    passes: int = 0
    iterations: int = 0
    speculated: int = 0
    num_drafts: int = 0
    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()

    @property
    def rate(self) -> float:
        """The output tokens per second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def tokens_per_step(self) -> float | None:
        """The output tokens per forward pass of the target and sequence."""
        return _share(self.tokens, self.passes)

    @property
    def acceptance(self) -> float | None:
        """The share of drafted tokens that was accepted."""
        return _share(sum(self.accepted), sum(self.drafted))

    @property
    def by_position(self) -> list[float]:
        """The share of drafted tokens that was accepted, at each place of a proposal."""
        pairs = zip_longest(self.accepted, self.drafted, fillvalue=0)
        return [accepted / drafted for accepted, drafted in pairs if drafted]

    @property
    def mean_length(self) -> float | None:
        """The mean number of tokens per proposal."""
        return _share(sum(self.drafted), self.num_drafts)

    @property
    def speculated_share(self) -> float | None:
        """The share of iterations that verified drafts."""
        return _share(self.speculated, self.iterations)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationCell:
    """The results of a case at one batch size.

    Attributes:
        lengths: ``adaptive``, or ``fixed K``.
        pairs: for each round, the run with speculation and the run without.
        identical: share of outputs that were the same token for token in both; ``None`` if that
            means nothing.
    """

    batch: int
    lengths: str
    pairs: Sequence[tuple[Counts, Counts]]
    identical: float | None

    @property
    def ratios(self) -> list[float]:
        """Tokens per second with speculation divided by those without, in each round."""
        return [with_.rate / without.rate for with_, without in self.pairs if without.rate > 0]

    @property
    def speedup(self) -> float:
        """The median of the rounds' ratios."""
        return statistics.median(self.ratios)

    @property
    def counts(self) -> Counts:
        """The counts of all runs with speculation."""
        return pooled(with_ for with_, _ in self.pairs)

    def to_dict(self) -> dict[str, Any]:
        """Return the cell as JSON values."""
        counts, without = self.counts, pooled(without for _, without in self.pairs)
        return {
            "speedup": _rounded(self.speedup),
            "speedup_min": _rounded(min(self.ratios)),
            "speedup_max": _rounded(max(self.ratios)),
            "rounds": len(self.ratios),
            "tokens_per_s": _rounded(counts.rate),
            "tokens_per_s_without": _rounded(without.rate),
            "tokens_per_step": _rounded(counts.tokens_per_step),
            "acceptance": _rounded(counts.acceptance),
            "acceptance_by_position": [_rounded(share) for share in counts.by_position],
            "mean_length": _rounded(counts.mean_length),
            "speculated_share": _rounded(counts.speculated_share),
            "identical_outputs": _rounded(self.identical),
        }


@dataclass(slots=True, kw_only=True)
class CaseResult:
    """The results of a case so far.

    Attributes:
        lossless: whether its outputs equal those without speculation; ``None`` if not checked.
        forced: counts of the lossless check, where every decode has drafts.
        missing: the reason why it could not run.
        synthetic: true if chance decided acceptance.
    """

    name: str
    cells: list[SpeculationCell] = field(default_factory=list)
    lossless: bool | None = None
    forced: Counts = field(default_factory=Counts)
    missing: str | None = None
    synthetic: bool = False

    @property
    def counts(self) -> Counts:
        """The counts from which acceptance is computed.

        They are those of the runs with adaptive lengths, or, if these never speculated, those of
        the lossless check.
        """
        adaptive = pooled(cell.counts for cell in self.cells if cell.lengths == "adaptive")
        return adaptive if adaptive.num_drafts else self.forced

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; ``speedup`` and ``tokens_per_step`` are those of batch size 1."""
        if self.missing is not None:
            return {"missing": self.missing}
        adaptive = {c.batch: c.to_dict() for c in self.cells if c.lengths == "adaptive"}
        fixed = {c.batch: c.to_dict() for c in self.cells if c.lengths != "adaptive"}
        lone = adaptive.get(1, {})
        result: dict[str, Any] = {
            "acceptance": _rounded(self.counts.acceptance),
            "acceptance_from": "check" if self.counts is self.forced else "adaptive",
            "speedup": lone.get("speedup"),
            "tokens_per_step": lone.get("tokens_per_step"),
            "acceptance_by_position": [_rounded(share) for share in self.counts.by_position],
            "by_batch": {str(batch): one for batch, one in adaptive.items()},
            "lossless": self.lossless,
        }
        if fixed:
            lengths = next(c.lengths for c in self.cells if c.lengths != "adaptive")
            by_batch = {str(batch): one for batch, one in fixed.items()}
            result["fixed"] = {"length": int(lengths.split()[-1]), "by_batch": by_batch}
        if self.synthetic:
            result["synthetic"] = True
        return result


def pooled(counts: Iterable[Counts]) -> Counts:
    """Return the sum of runs."""
    every = list(counts)
    names = ("tokens", "seconds", "passes", "iterations", "speculated", "num_drafts")
    return Counts(
        **{name: sum(getattr(one, name) for one in every) for name in names},
        drafted=tuple(add_up(one.drafted for one in every)),
        accepted=tuple(add_up(one.accepted for one in every)),
    )


def add_up(rows: Iterable[Sequence[int]]) -> list[int]:
    """Return sums by place of rows that may differ in length."""
    return [sum(column) for column in zip_longest(*rows, fillvalue=0)]


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Return the first position at which two outputs differ; ``None`` if they are the same."""
    for place, (left, right) in enumerate(zip_longest(one, other)):
        if left != right:
            return place
    return None


def summary(results: Iterable[CaseResult], device: str, *, quick: bool) -> dict[str, Any]:
    """Return the JSON line.

    ``lossless`` is true only if every case that ran was checked and agreed, and ``None`` if none
    was checked.
    """
    every = list(results)
    ran = [one for one in every if one.missing is None]
    checked = [one.lossless for one in ran if one.lossless is not None]
    line: dict[str, Any] = {
        "lossless": (all(checked) and len(checked) == len(ran)) if checked else None,
        "cases": {one.name: one.to_dict() for one in every},
        "device": device,
        "quick": quick,
    }
    if any(one.synthetic for one in every):
        line["synthetic"] = True
    return line


def histogram(shares: Sequence[float]) -> list[str]:
    """Return a line per place of a proposal: its number from 1 on, a bar, per cent."""
    return [
        f"{place:3} {'#' * round(BAR_WIDTH * share):{BAR_WIDTH}} {100 * share:5.1f}%"
        for place, share in enumerate(shares, start=1)
    ]


def table(results: Iterable[CaseResult]) -> list[str]:
    """Return lines: a row per case, kind of lengths and batch size, then acceptance by position."""
    headings = ("case", "lengths", "batch", "speed ratio", "(min-max)", "tok/s", "without",
                "tok/step", "accepted", "length", "speculated", "same")  # fmt: skip
    rows, missing, bars = [], [], []
    every = list(results)
    for one in every:
        mark = SYNTHETIC if one.synthetic else ""
        if one.missing is not None:
            missing.append(f"{mark}{one.name}: missing, {one.missing}")
            continue
        rows += [_cells(mark + one.name, cell) for cell in one.cells]
        if one.counts.by_position:
            where = ", of the lossless check" if one.counts is one.forced else ""
            bars.append(f"{mark}{one.name}: accepted by position{where}")
            bars += [mark + line for line in histogram(one.counts.by_position)]
    mark = SYNTHETIC if any(one.synthetic for one in every) else ""
    lines = text_table((mark + headings[0], *headings[1:]), rows).splitlines()
    return [*lines, *missing, *bars]


def _cells(name: str, cell: SpeculationCell) -> tuple[object, ...]:
    counts, without = cell.counts, pooled(without for _, without in cell.pairs)
    spread = f"({min(cell.ratios):.2f}-{max(cell.ratios):.2f})"
    return (
        name,
        cell.lengths,
        cell.batch,
        f"{cell.speedup:.2f}",
        spread,
        f"{counts.rate:.1f}",
        f"{without.rate:.1f}",
        _text(counts.tokens_per_step, ".2f"),
        _text(counts.acceptance, ".0%"),
        _text(counts.mean_length, ".1f"),
        _text(counts.speculated_share, ".0%"),
        _text(cell.identical, ".0%"),
    )


def plot(results: Sequence[CaseResult], file: str) -> None:
    """Save two panels: acceptance by position, and the speed ratio by batch size."""
    from matplotlib import pyplot

    figure, (left, right) = figure_of(2, panel_inches=(5.5, 4.2))
    shown = [one for one in results if one.cells]
    for i, one in enumerate(shown):
        style: Mapping[str, Any] = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": ("-", "--")[i // len(COLOURS) % 2],
            "label": (SYNTHETIC if one.synthetic else "") + one.name,
        }
        shares = [100 * share for share in one.counts.by_position]
        left.plot(range(1, len(shares) + 1), shares, **style)
        cells = sorted((c for c in one.cells if c.lengths == "adaptive"), key=lambda c: c.batch)
        right.plot([str(c.batch) for c in cells], [c.speedup for c in cells], **style)
    right.axhline(1.0, color=SLATE, linestyle=":", linewidth=1.2)
    left.set(xlabel="position in the proposal", ylabel="% accepted of those drafted there")
    left.set_ylim(0, 102)
    left.locator_params(axis="x", integer=True)
    right.set(xlabel="batch size", ylabel="decode speed over that without speculation")
    right.set_ylim(bottom=0)
    handles, labels = right.get_legend_handles_labels()
    rows = max(1, -(-len(shown) // 4))
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.05 + 0.045 * rows, 1, 1))
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _text(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)
