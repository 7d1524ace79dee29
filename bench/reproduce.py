"""Repeats the evaluation of SLOs-Serve (arXiv 2504.08784) with minserve's own simulator.

Capacity is the most requests per second and GPU at which at least 90% of all offered requests
attain their SLO (deadline form). `dp` and `edf` are minserve's planners; the baselines are as
strong as the real systems: vLLM (decodes first, the better of two budgets), Sarathi-Serve (the best
of its token budgets, among them the budgets that just fit the promised paces), prefills first with
whole prompts, DistServe (the best of three ratios). Each baseline but DistServe is tried with and
without drafts of the best fixed length. Performance models are the published ones. For reasoning
that is Qwen2.5-7B, which has the same architecture as DeepSeek-R1-Distill-Qwen-7B: the paper used
the distilled 1.5B model, for which none is published.
Results are kept as they come, and an interrupted run continues when it is started again. Tables go
to ``bench/results/reproduce.md``, figures to ``reproduce.json``, pictures beside them.

    .venv/bin/python bench/reproduce.py                    # everything, 40 minutes on 2 cores
    .venv/bin/python bench/reproduce.py --quick            # OPT-6.7B alone, under 5 minutes
    .venv/bin/python bench/reproduce.py --only capacity,scaling
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

from minserve.machine import Machine, machine_words
from minserve.workload.plots import GET_MATPLOTLIB
from parts.reproduce.plan import Plan
from parts.reproduce.plots import draw_all
from parts.reproduce.report import details, markdown, summary
from parts.reproduce.sections import NOT_QUICK, SECTIONS, jobs_of
from shared.simulated.jobs import fingerprint
from shared.simulated.run import Done, ResultStore, run_all

RESULTS = Path(__file__).resolve().parent / "results"


def evaluate(
    plan: Plan,
    sections: list[str],
    store: ResultStore,
    num_workers: int,
    folder: Path,
    command: str,
) -> tuple[Done, dict]:
    """Measure sections, then write the results of all sections so far; returns the summary too."""
    done = run_all(lambda: jobs_of(plan, sections, store), store, num_workers)
    # All sections that were measured, by this run or by one before it.
    known = [job for job in jobs_of(plan, list(SECTIONS), store) if job in store]
    seconds = store.seconds_of(known)
    tables = markdown(plan, store)
    figures = {
        **summary(plan, store, seconds / num_workers),
        "core_seconds": round(seconds, 1),
        "jobs": len(known),
        "complete": not (done.interrupted or done.errors),
    }
    stem = "reproduce-quick" if plan.quick else "reproduce"
    folder.mkdir(parents=True, exist_ok=True)
    text = f"# {command}\n\n{machine_words()}; {len(known)} jobs, {seconds:.0f} s of one core.\n"
    (folder / f"{stem}.md").write_text(f"{text}\n{tables}\n", encoding="utf-8")
    whole = {**figures, "source": fingerprint(), "machine": machine_words()}
    whole["details"] = details(plan, store)
    (folder / f"{stem}.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(tables, flush=True)
    if importlib.util.find_spec("matplotlib") is None:
        print(
            f"no pictures without matplotlib; run in minserve's folder: {GET_MATPLOTLIB}",
            file=sys.stderr,
        )
    else:
        for file in draw_all(plan, store, folder, stem):
            print(f"wrote {file}", file=sys.stderr)
    for job, error in done.errors.items():
        print(f"failed: {error}\n  {job}", file=sys.stderr)
    return done, figures


def _sections(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in SECTIONS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(
            f"no section {', '.join(unknown) or 'named'}; there are {', '.join(SECTIONS)}"
        )
    return names


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="OPT-6.7B alone, fewer requests")
    parser.add_argument("--only", type=_sections, help=f"some of {', '.join(SECTIONS)}")
    parser.add_argument(
        "--jobs", type=int, default=Machine.look().num_processes, help="worker processes"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS / "reproduce", help="where finished jobs are kept"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="tables, figures and pictures")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    sections = args.only or [one for one in SECTIONS if not (args.quick and one in NOT_QUICK)]
    # Simulations are pure Python: more threads would only disturb each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    command = " ".join(
        [".venv/bin/python bench/reproduce.py", *(argv if argv is not None else sys.argv[1:])]
    )
    store = ResultStore(args.results)
    done, figures = evaluate(Plan(quick=args.quick), sections, store, args.jobs, args.out, command)
    if done.interrupted:
        print("interrupted; the same command goes on from here", file=sys.stderr)
    print(json.dumps(figures))
    return 130 if done.interrupted else 1 if done.errors else 0


if __name__ == "__main__":
    raise SystemExit(main())
