"""What to do when a batch fails: run it in parts until it is known whose fault it was.

A part that runs gives its sequences the tokens that the whole batch would have given, since a
forward pass changes no sequence and writes the same KV again. With one culprit among n sequences
that takes about 2 log2(n) runs more, and never more than 2 n.

Where memory ran out, smaller batches need less of it, and what does not fit even alone runs in
shorter chunks. Sequences are not preempted for it: their blocks are part of a cache of fixed size,
and giving them up would free nothing.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence as SequenceOf

from minserve.engine.batch import BatchRunner, RunResult, Scheduled
from minserve.engine.live_output import End, Output
from minserve.errors import DeviceLostError, GenerationError, MinserveError
from minserve.outputs import OutputDelta
from minserve.request import FinishReason

log = logging.getLogger(__name__)

# Chunks are not split further: a pass over so few tokens needs hardly more memory than one.
SHORTEST_CHUNK = 16
# What torch, its allocators and CUDA's libraries say of memory that they did not get.
_NO_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")

# What the sequences of a batch gave, by id, or the error that each met.
Outcomes = dict[str, "RunResult | Exception"]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory, of the device or the host, ran out."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY)


def recover(runner: BatchRunner, batch: SequenceOf[Scheduled], error: Exception) -> Outcomes:
    """Run a batch that failed in parts.

    Args:
        batch: may be empty, where all that it was for has ended.
        error: the error of the whole batch.

    Returns:
        the result of each sequence, or its own error.

    Raises:
        DeviceLostError: if the error belongs to no sequence: the device runs nothing any more.
    """
    _drop_locals(error)
    if isinstance(error, DeviceLostError):
        raise error
    if runner.is_lost:
        raise DeviceLostError(
            f"{runner.device} runs nothing any more; restart the process ({error})"
        ) from error
    if not batch:
        return {}
    if len(batch) > 1:
        half = len(batch) // 2
        return _run(runner, batch[:half]) | _run(runner, batch[half:])
    (item,) = batch
    if item.proposal is not None:
        return _run(runner, [item._replace(proposal=None)])
    if is_out_of_memory(error) and item.num_tokens > SHORTEST_CHUNK:
        return {item.seq.seq_id: _run_halves(runner, item)}
    log.error("running %s failed", item.seq, exc_info=error)
    return {item.seq.seq_id: error}


def _run(runner: BatchRunner, batch: SequenceOf[Scheduled]) -> Outcomes:
    """Run a batch, in parts if it fails."""
    try:
        return dict(runner.launch(batch).results())
    except Exception as caught:
        error = caught
    # Outside of the handler, where nothing refers to the failed pass any more.
    return recover(runner, batch, error)


def _run_halves(runner: BatchRunner, item: Scheduled) -> RunResult | Exception:
    """Run a chunk as two chunks, one after the other."""
    seq, half = item.seq, item.num_tokens // 2
    first = _run(runner, [item._replace(num_tokens=half)])[seq.seq_id]
    if isinstance(first, Exception):
        return first
    rest = Scheduled(seq.ahead(half, 0.0), item.num_tokens - half)
    second = _run(runner, [rest])[seq.seq_id]
    if not isinstance(second, Exception):
        second.prompt_logprobs[:0] = first.prompt_logprobs
    return second


def _drop_locals(error: BaseException | None) -> None:
    """Let go of the tensors that the frames of an error hold on to."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def failure_of(error: Exception) -> MinserveError:
    """Return what a client is told of an error that ends its output."""
    if isinstance(error, MinserveError):
        return error
    return GenerationError(f"generation failed: {type(error).__name__}: {error}")


def last_words(output: Output, end: End, error: Exception | None) -> tuple[OutputDelta, End]:
    """Return the last delta of an output, and how it ends: with an error where its text cannot be
    made. Whatever is wrong with it, its blocks must be freed.
    """
    try:
        return output.last_news(end, error), end
    except Exception as failure:
        log.exception("the last words of %s failed", output.seq)
        end = End(FinishReason.ERROR)
        delta = OutputDelta(
            request_id=output.seq.request.request_id,
            index=output.seq.index,
            finish_reason=end.reason,
            error=error or GenerationError(f"generation failed: {failure!r}"),
        )
        return delta, end
