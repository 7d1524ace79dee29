"""Workers of `reproduce.py`, and the file that remembers what they found."""

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

from reproduce_jobs import Job, Result
from tqdm import tqdm

FILE = "jobs.jsonl"


class ResultStore:
    """Results by key, each a line of a file, so that a run goes on where it was broken off.

    Args:
        folder: made if it is not there; ``None`` keeps nothing.

    Attributes:
        seconds: of all results together, as their workers took them.
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
                # The last line of a run that was killed while it wrote.
                continue
        if text and not text.endswith("\n"):
            with self._file.open("a", encoding="utf-8") as file:
                file.write("\n")

    def __contains__(self, job: Job) -> bool:
        return job.key in self._results

    def __call__(self, job: Job) -> Result | None:
        """The result of a job, ``None`` where it has not been measured."""
        return self._results.get(job.key)

    def add(self, job: Job, result: Result, seconds: float) -> None:
        """Remember it, here and in the file."""
        # As it will be read again, with strings as keys and lists for tuples.
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
        """That the workers took for those of these jobs that are done."""
        return sum(self._seconds.get(job.key, 0.0) for job in jobs)


@dataclass(slots=True)
class Done:
    """How a run ended.

    Attributes:
        jobs: all that were asked for.
        errors: by job, what went wrong.
        interrupted: True where Ctrl-C ended it.
    """

    jobs: list[Job] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


def run_all(ask: Callable[[], list[Job]], store: ResultStore, num_workers: int) -> Done:
    """Run jobs until none is asked for that has not been run.

    Args:
        ask: for all jobs that are known to be needed by now.
    """
    done = Done()
    with tqdm(unit="job", dynamic_ncols=True, smoothing=0.05) as bar:
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
    """Run these jobs: those that must be alone one by one, once the others are done."""
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
    """Results as they come, the error's text in place of one that failed."""
    if not jobs:
        return
    # A fresh interpreter, which took no part in whatever this one has open.
    context = multiprocessing.get_context("spawn")
    workers = min(num_workers, len(jobs))
    executor = ProcessPoolExecutor(workers, context, _begin_worker)
    try:
        futures = {executor.submit(_attempt, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        # Those who still work at something will not be asked for it any more.
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
