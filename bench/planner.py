"""Measures the time of planning, and how often admission is proven to be the best.

It times whole `DpPlanner.plan` calls on real sequences and a real block pool: with a round of
admission (as after every arrival and finish) and without (batch formation alone), at several
numbers of waiting sequences beside 64 running sequences. The device is the published profile of
OPT-6.7B on an A100 (arXiv 2504.08784). Its load is such that some waiting sequences fit and some do
not, because then the dynamic program has most work. Then it compares admission with brute force
over all subsets of small random instances. `proven` is the share of rounds whose set is proven to be
the best: the search keeps few states where there are many. The last line is JSON.

    .venv/bin/python bench/planner.py          # a table
    .venv/bin/python bench/planner.py --json   # the last line alone
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from minserve.engine.block_pool import BlockPool
from minserve.planner.admission.dynamic_program import admit
from minserve.planner.admission.outlook import Outlook
from minserve.planner.admission.prefill_rates import PrefillRates
from minserve.planner.admission.timeline import Admission, Candidate, simulate
from minserve.planner.plan import PlannerView
from minserve.planner.policies.dp import DpPlanner
from minserve.planner.predict.perf_model import PerfModel, Piece
from minserve.progress_bar import progress_bar
from minserve.request import Request, Sequence, SequenceState
from minserve.sampling_params import SamplingParams
from minserve.slo.attainment import Progress
from minserve.slo.objectives import SLO, Standing
from minserve.tables import text_table
from minserve.workload.report import percentile
from parts.planner.instances import best_by_brute_force, random_instance

A100 = (Piece(tokens=6.878e-5, base=0.0248), Piece(tokens=7.523e-5, base=0.003033))
TPOTS = (0.05, 0.075, 0.1)
SIZES = [(running, waiting) for running in (64,) for waiting in (8, 16, 32, 64)] + [(512, 32)]
HEADLINE = "64 running, 32 waiting, 3 tiers"
BLOCK_SIZE, NUM_BLOCKS = 16, 30_000


@dataclass(frozen=True)
class PlanningTiming:
    """Milliseconds of `plan`, with a round of admission and without.

    Attributes:
        admitted: mean number of sequences that the last round of a situation chose.
        proven: share of the rounds whose set is proven to be the best.
    """

    review_p50: float
    review_p99: float
    form_p50: float
    form_p99: float
    admitted: float
    proven: float


def make_view(rng: random.Random, running: int, waiting: int, tiers: int) -> PlannerView:
    """Return a view with sequences in the middle of their lives, at time 0."""
    pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE, prefix_caching=True)
    decoding = []
    for i in range(running):
        seq = make_sequence(rng, f"run{i}", tiers, arrival=-rng.uniform(2.0, 8.0))
        done = rng.randint(1, 100)
        pool.grow(seq, seq.num_tokens + done)
        seq.num_computed_tokens = seq.num_tokens + done - 1
        seq.token_ids += [0] * done
        seq.state, seq.standing = SequenceState.RUNNING, Standing.ADMITTED
        # Each sequence is on schedule, or up to two tokens ahead of it.
        tpot = seq.progress.tpot_s
        begun = -(done - 1) * tpot + rng.uniform(0.0, 2.0) * tpot
        seq.progress = Progress(seq.progress.targets, begun)
        for number in range(done):
            seq.progress.add_token(begun + number * tpot)
        decoding.append(seq)
    arrived = [
        make_sequence(rng, f"wait{i}", tiers, arrival=-rng.uniform(0.0, 0.3))
        for i in range(waiting)
    ]
    return PlannerView(
        waiting=sorted(arrived, key=lambda s: s.rank),
        running=sorted(decoding, key=lambda s: s.rank),
        memory=pool,
        token_budget=2048,
        max_num_seqs=1024,
    )


def make_sequence(rng: random.Random, name: str, tiers: int, arrival: float) -> Sequence:
    slo = SLO(ttft=rng.uniform(0.8, 3.0), tpot=TPOTS[rng.randrange(tiers)])
    prompt = tuple(rng.randrange(50_000) for _ in range(rng.randint(100, 1500)))
    request = Request(
        request_id=name,
        prompt_token_ids=prompt,
        params=SamplingParams(max_tokens=300),
        seed=0,
        arrival_s=arrival,
        slo=slo,
        targets=slo.resolve(0.0, 0.0),
    )
    return Sequence(request)


class ObservedPlanner(DpPlanner):
    """`dp`, with its newest choice at hand."""

    newest: Admission

    def choose(
        self, candidates: SequenceOf[Candidate], outlook: Outlook, rates: PrefillRates
    ) -> Admission:
        self.newest = super().choose(candidates, outlook, rates)
        return self.newest


def time_planning(
    running: int, waiting: int, tiers: int, samples: int, seed: int
) -> PlanningTiming:
    """Time plans at several moments of several situations; only the first call hashes prompts."""
    rng, review, form, admitted, proven = random.Random(seed), [], [], [], []
    for _ in range(samples):
        view = make_view(rng, running, waiting, tiers)
        planner = ObservedPlanner(PerfModel(A100, margin=1.05))
        planner.plan(view, 0.0)
        # A server's sequences are older than a plan. The collector must not meet these, with all
        # their tokens, for the first time while a plan is timed.
        gc.collect()
        for moment in range(1, 4):
            now = 0.11 * moment
            started = time.perf_counter()
            planner.plan(view, now)  # 0.1 s have passed, so this call includes a round of admission
            between = time.perf_counter()
            proven.append(planner.newest.exact)
            planner.plan(view, now + 0.001)
            review.append(between - started)
            form.append(time.perf_counter() - between)
        admitted.append(len(planner.newest.accepted))
    return PlanningTiming(
        1e3 * percentile(review, 0.5),
        1e3 * percentile(review, 0.99),
        1e3 * percentile(form, 0.5),
        1e3 * percentile(form, 0.99),
        statistics.mean(admitted),
        statistics.mean(proven),
    )


def agreement(instances: int, seed: int, progress: bool) -> float:
    """Return the share of small random instances on which admission equals brute force.

    Equal means the same value, and a set that the event simulation finds feasible. Instances
    whose forced candidates never fit for good are left out, because no result can be compared.
    """
    agreed = compared = 0
    for number in progress_bar(range(instances), desc="brute force", disable=not progress):
        # Some instances have requests of one output each, some of up to so many outputs.
        most_seqs = (1, 3, 12)[number % 3]
        instance = random_instance(
            random.Random(seed + number), num_candidates=7, most_seqs=most_seqs
        )
        best = best_by_brute_force(instance)
        if best is None:
            continue
        compared += 1
        got = admit(instance.candidates, instance.outlook, instance.rates)
        chosen = [instance.candidates[i] for i in got.accepted]
        feasible = simulate(chosen, instance.outlook, instance.rates).feasible
        # Requests are released at their predicted ends, so a set may hold more than the program
        # counts on.
        agreed += got.feasible and feasible and got.value >= best[0] - 1e-9
    return agreed / compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--samples",
        type=int,
        default=60,
        help="situations of the headline's size; a quarter of them for other sizes",
    )
    parser.add_argument("--instances", type=int, default=2000, help="compared with brute force")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the last line alone")
    args = parser.parse_args()
    gc.freeze()  # as the server does
    rows = {}
    cases = [(r, w, t) for r, w in SIZES for t in (1, 2, 3)]
    for running, waiting, tiers in progress_bar(cases, desc="planning", disable=args.json):
        name = f"{running} running, {waiting} waiting, {tiers} tiers"
        samples = args.samples if name == HEADLINE else -(-args.samples // 4)
        rows[name] = time_planning(running, waiting, tiers, samples, args.seed)
    share = agreement(args.instances, args.seed, not args.json)
    if not args.json:
        head = ("", "p50 ms", "p99 ms", "formation p50", "p99", "chosen", "proven")
        cells = [
            (name, *(round(ms, 2) for ms in (t.review_p50, t.review_p99, t.form_p50, t.form_p99)),
             round(t.admitted, 1), f"{t.proven:.1%}")
            for name, t in rows.items()
        ]  # fmt: skip
        print(text_table(head, cells))
        print(f"admission equals brute force on {share:.2%} of {args.instances} instances")
    headline = rows[HEADLINE]
    print(
        json.dumps(
            {
                "p50_ms": round(headline.review_p50, 3),
                "p99_ms": round(headline.review_p99, 3),
                "formation_p50_ms": round(headline.form_p50, 3),
                "formation_p99_ms": round(headline.form_p99, 3),
                "proven": round(headline.proven, 3),
                "bruteforce_agreement": share,
                "sizes": {
                    name: {"p50_ms": round(t.review_p50, 3), "p99_ms": round(t.review_p99, 3)}
                    for name, t in rows.items()
                },
            }
        )
    )


if __name__ == "__main__":
    main()
