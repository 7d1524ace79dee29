"""Recordings: real lengths of whole conversations, some with their arrival times.

They are data (``data/README.md``), read on first use. Each reader's docstring compares its
lengths with those that the SLOs-Serve evaluation (arXiv 2504.08784) reports for its own data,
as mean/p99/standard deviation in tokens.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

from minserve.slo.objectives import SLO, preset_classes
from minserve.workload.data_files import data_path, read_lengths
from minserve.workload.traces import TraceRequest, read_trace

# The context of OPT, the model family of that evaluation; longer requests are left out.
MAX_MODEL_LEN = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The lengths of one turn. Its prompt is all earlier prompts and answers, then `new_tokens`.

    Attributes:
        output_tokens: of the whole output.
        thinking_tokens: of these, the tokens before ``</think>``.
    """

    slo: SLO
    new_tokens: int
    output_tokens: int
    thinking_tokens: int = 0


Chain = tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class Recording:
    """Chains of calls in the order of their arrival.

    Attributes:
        times: arrival times of the chains in seconds, ascending; empty if only their lengths are
            known, so that any order will do.
        period_s: length of the recording in seconds; longer than from the first to the last
            arrival.
    """

    chains: tuple[Chain, ...]
    times: tuple[float, ...] = ()
    period_s: float = 0.0


@cache
def chatbot() -> Recording:
    """5 minutes of a chat service (Azure's trace of November 2023): 1391 requests of at most 2048
    tokens.

    The paper reports prompts 763/1591/424, outputs 266/619/160. Here they are 763/1592/424 and
    267/620/160: these are the same rows.
    """
    return _window("azure2023_conv", "chatbot", 900.0, 1200.0)


@cache
def coding() -> Recording:
    """5 minutes of a code completion service (Azure's trace of November 2023): 559 requests of at
    most 2048 tokens, in bursts.

    The paper reports prompts 847/2010/617, outputs 26/232/47. Here they are 847/2010/617 and
    27/233/48: these are the same rows.
    """
    return _window("azure2023_code", "coding", 1786.0, 2086.0)


@cache
def summarization() -> Recording:
    """Papers and their abstracts in tokens (arXiv, by Vidur): pairs of at most 2048 tokens.

    The paper reports prompts 1333/1946/444, outputs 202/-/234. Here they are 1333/1947/445 and
    203/1509/234: most likely the same rows. Some abstracts are longer than their paper, because
    the extraction failed; they stay in, because the paper's figures include them.
    """
    slo = preset_classes()["summarization"]
    return Recording(
        tuple(
            (Call(slo=slo, new_tokens=prompt, output_tokens=output),)
            for row in read_lengths("arxiv_summarization")
            for prompt, output in [(int(row["prompt_tokens"]), int(row["output_tokens"]))]
            if prompt + output <= MAX_MODEL_LEN
        )
    )


# When the whole answer is due, by class.
DEADLINES = {
    "edit": SLO(finish=5.0, name="edit"),
    "summary": SLO(finish=15.0, name="summary"),
    "report": SLO(finish=60.0, name="report"),
}


@cache
def deadlines() -> Recording:
    """Requests of which the whole answer is due by a deadline, a third of each class.

    An ``edit`` has the lengths of a code completion, a ``summary`` those of a paper and its
    abstract, a ``report`` those of a chat.
    """
    parts = zip(coding().chains, summarization().chains, chatbot().chains, strict=False)
    return Recording(
        tuple(
            (replace(call, slo=slo),)
            for chains in parts
            for (call,), slo in zip(chains, DEADLINES.values(), strict=True)
        )
    )


# The paper's mean tokens, per call (tools) and per request (reasoning).
TOOL_PROMPT, TOOL_OUTPUT = 690, 116
REASONING_PROMPT, REASONING_THINKING, REASONING_ANSWER = 127, 4693, 803


@cache
def tools() -> Recording:
    """Recorded calls of a model that uses tools (ToolBench): 151 chains of 2 to 6 calls.

    Each of the 15 recordings is a depth-first search: now and then the model goes back some
    rounds and tries another way. A chain is one way from the first round to a last round; a
    call that lies on several ways is in each of their chains. A call's prompt is the prompt and
    answer before it plus what is new, as recorded. Outputs are multiplied by 0.987 and new parts
    of prompts by 0.253, which gives the paper's means per call: ToolBench's prompts are three
    times as long.

    The paper reports, per call, prompts 690/2131/356, outputs 116/363/66. Here they are
    690/1482/301 and 116/366/97.
    """
    paths = _paths(read_lengths("toolbench_calls"))
    outputs = [output for path in paths for _, output in path]
    # The tokens of each call's prompt, split: those that never were an answer, and those that were.
    never, answered = zip(*[part for path in paths for part in _parts(path)], strict=True)
    output_factor = TOOL_OUTPUT / statistics.fmean(outputs)
    of_answers = output_factor * statistics.fmean(answered)
    new_factor = (TOOL_PROMPT - of_answers) / statistics.fmean(never)
    loop, final = preset_classes()["tool_loop"], preset_classes()["tool_final"]
    return Recording(
        tuple(
            tuple(
                Call(
                    slo=final if i == len(path) else loop,
                    new_tokens=scaled(new, new_factor),
                    output_tokens=scaled(output, output_factor),
                )
                for i, (new, output) in enumerate(path, start=1)
            )
            for path in paths
        )
    )


@cache
def reasoning() -> Recording:
    """1000 questions of s1K, with the thoughts and answers of a model.

    Lengths are multiplied by 1.07, 1.09 and 1.10, which gives the paper's means of 127
    (prompt), 4693 (thinking) and 803 (answer).

    The paper reports prompts 127/421/83. Here they are 127/419/82.
    """
    rows = read_lengths("s1k_reasoning")
    columns = {
        "prompt_tokens": REASONING_PROMPT,
        "thinking_tokens": REASONING_THINKING,
        "answer_tokens": REASONING_ANSWER,
    }
    prompts, thoughts, answers = (
        [scaled(int(row[name]), mean / _mean(rows, name)) for row in rows]
        for name, mean in columns.items()
    )
    slo = preset_classes()["reasoning"]
    return Recording(
        tuple(
            (Call(slo=slo, new_tokens=p, output_tokens=t + a, thinking_tokens=t),)
            for p, t, a in zip(prompts, thoughts, answers, strict=True)
        )
    )


def scaled(tokens: int, factor: float) -> int:
    """Return a length times a factor, rounded, at least 1."""
    return max(1, round(tokens * factor))


def _mean(rows: list[dict[str, str]], name: str) -> float:
    return statistics.fmean(int(row[name]) for row in rows)


def _window(trace: str, name: str, start_s: float, end_s: float) -> Recording:
    rows = [row for row in read_trace(data_path("arrivals", trace)) if _fits(row, start_s, end_s)]
    slo = preset_classes()[name]
    return Recording(
        tuple(
            (Call(slo=slo, new_tokens=row.prompt_tokens, output_tokens=row.output_tokens),)
            for row in rows
        ),
        tuple(row.arrival_s for row in rows),
        end_s - start_s,
    )


def _fits(row: TraceRequest, start_s: float, end_s: float) -> bool:
    return (
        start_s <= row.arrival_s <= end_s and row.prompt_tokens + row.output_tokens <= MAX_MODEL_LEN
    )


def _paths(rows: list[dict[str, str]]) -> list[list[tuple[int, int]]]:
    """Return the ways from a search's first round to each of its last rounds.

    Args:
        rows: calls of ToolBench, in the order of each search.

    Returns:
        for each way, (new prompt tokens, output tokens) of each call.
    """
    rounds = [int(row["round"]) for row in rows] + [1]
    paths: list[list[tuple[int, int]]] = []
    path: list[tuple[int, int]] = []
    for i, row in enumerate(rows):
        new, output = int(row["new_prompt_tokens"]), int(row["output_tokens"])
        path = [*path[: rounds[i] - 1], (new, output)]
        if rounds[i + 1] <= rounds[i]:
            paths.append(path)
    return paths


def _parts(path: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return for each call's prompt the tokens that never were an answer, and those that were."""
    news = accumulate(new for new, _ in path)
    answers = accumulate((output for _, output in path[:-1]), initial=0)
    return list(zip(news, answers, strict=True))
