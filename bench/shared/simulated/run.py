"""Workers of `reproduce.py`, and the file that stores their results."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from minserve.progress_bar import progress_bar
from shared.simulated.jobs import Job, Result

FILE = "jobs.jsonl"


class ResultStore:
    """Results by key, each a line of a file, so that an interrupted run can continue.

    Args:
        folder: made if it does not exist; ``None`` keeps nothing.

    Attributes:
        seconds: of all results together, as measured by their workers.
    """

    def __init__(self, folder: Path | None) -> None:
        self._file = None if folder is None else folder / FILE
        self._results: dict[str, Result] = {}
        self._seconds: dict[str, float] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        if self._file is not None and self._file.exists():
            self._read()

    def _read(self) -> None:
        text = self._file.read_text(encoding="utf-8")
        for line in text.splitlines():
            try:
                row = json.loads(line)
                self._results[row["key"]], self._seconds[row["key"]] = row["result"], row["seconds"]
            except (ValueError, KeyError):
                # This is the last line of a run that was killed while it wrote.
                continue
        if text and not text.endswith("\n"):
            with self._file.open("a", encoding="utf-8") as file:
                file.write("\n")

    def __contains__(self, job: Job) -> bool:
        return job.key in self._results

    def __call__(self, job: Job) -> Result | None:
        """Return the result of a job; ``None`` if it has not been measured."""
        return self._results.get(job.key)

    def add(self, job: Job, result: Result, seconds: float) -> None:
        """Store a result, in memory and in the file."""
        # In the form in which it is read again, with strings as keys and lists for tuples.
        self._results[job.key] = json.loads(json.dumps(result))
        self._seconds[job.key] = seconds
        if self._file is None:
            return
        row = {
            "key": job.key,
            "seconds": round(seconds, 2),
            "job": json.loads(job.text),
            "result": result,
        }
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def seconds_of(self, jobs: Sequence[Job]) -> float:
        """Return the seconds that workers took for these jobs, as far as they are done."""
        return sum(self._seconds.get(job.key, 0.0) for job in jobs)


@dataclass(slots=True)
class Done:
    """The outcome of a run.

    Attributes:
        jobs: all jobs that were asked for.
        errors: by job, the text of its error.
        interrupted: True if Ctrl-C ended the run.
    """

    jobs: list[Job] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


def run_all(ask: Callable[[], list[Job]], store: ResultStore, num_workers: int) -> Done:
    """Run jobs until all that are asked for have been run.

    Args:
        ask: returns all jobs that are known to be needed by now.
    """
    done = Done()
    with progress_bar(unit="job", dynamic_ncols=True, smoothing=0.05) as bar:
        try:
            while True:
                done.jobs = ask()
                left = [j for j in done.jobs if j not in store and j.text not in done.errors]
                bar.total = len(done.jobs)
                bar.n = len(done.jobs) - len(left)
                bar.refresh()
                if not left:
                    break
                _run(left, store, num_workers, done, bar)
        except KeyboardInterrupt:
            done.interrupted = True
        except BrokenExecutor:
            done.errors["a worker"] = "it ended by itself: killed, or out of memory"
    return done


def _run(jobs: list[Job], store: ResultStore, num_workers: int, done: Done, bar: tqdm) -> None:
    """Run these jobs; jobs that must be alone run one by one, after the others."""
    together = sorted((job for job in jobs if not job.alone), key=lambda job: -job.cost)
    alone = [job for job in jobs if job.alone]
    for part, count in ((together, num_workers), (alone, 1)):
        for job, outcome in _outcomes(part, count):
            if isinstance(outcome, str):
                done.errors[job.text] = outcome
            else:
                store.add(job, *outcome)
            bar.update()


Outcome = tuple[Result, float] | str


def _outcomes(jobs: list[Job], num_workers: int) -> Iterator[tuple[Job, Outcome]]:
    """Yield results as they come; for a job that failed, the error's text."""
    if not jobs:
        return
    # New interpreters, which share no open file or lock with this one.
    context = multiprocessing.get_context("spawn")
    workers = min(num_workers, len(jobs))
    executor = ProcessPoolExecutor(workers, context, _begin_worker)
    try:
        futures = {executor.submit(_attempt, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        # A worker that is still busy has a result that is no longer wanted.
        for child in multiprocessing.active_children():
            child.terminate()


def _begin_worker() -> None:
    # Ctrl-C reaches all processes of the terminal; the first one tells the others to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(5)


def _attempt(job: Job) -> Outcome:
    began = time.perf_counter()
    try:
        result = job.run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return result, time.perf_counter() - began
