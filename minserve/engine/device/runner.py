"""`ModelRunner` runs a batch of sequences in one mixed forward pass and samples their tokens."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from minserve.engine.batch import BatchRunner, RunResult, Scheduled
from minserve.engine.device.batch_tensors import Chunk
from minserve.engine.device.paged_model import PagedModel
from minserve.engine.device.thread_count import ThreadCount
from minserve.engine.sampling.sampler import Sampler
from minserve.engine.speculation.verification import PendingTokens
from minserve.errors import ConfigError, GenerationError
from minserve.kernels.attention import AttentionBackend, LayerKV
from minserve.models.base import CausalLM
from minserve.outputs import TokenLogprob

# Prompt logprobs need logits of every prompt row; this many rows are held at a time.
PROMPT_LOGPROB_ROWS = 64


class _PromptRows(NamedTuple):
    """Hidden states whose logits tell the log probabilities of a piece of a prompt.

    Attributes:
        hidden: ``[len(token_ids), hidden]``, row i predicting token i.
        num_top: the number of most likely tokens that are asked for besides.
    """

    seq_id: str
    hidden: Tensor
    token_ids: list[int]
    num_top: int


class InFlightBatch:
    """A batch that was handed to the device. `results` waits for what it gives.

    Args:
        seq_ids: the ids of all sequences of the batch.
        sampling: the ids of those that get a token, in the order of ``pending``.
        prompt_logprobs: computes the log probabilities of a piece of a prompt.
    """

    def __init__(
        self,
        seq_ids: SequenceOf[str],
        sampling: SequenceOf[str],
        pending: PendingTokens | None,
        prompts: SequenceOf[_PromptRows],
        prompt_logprobs: Callable[[_PromptRows], list[TokenLogprob]],
    ) -> None:
        self._seq_ids = seq_ids
        self._sampling = sampling
        self._pending = pending
        self._prompts = prompts
        self._prompt_logprobs = prompt_logprobs

    @torch.inference_mode()
    def results(self) -> dict[str, RunResult]:
        """Wait for the device and return the results by sequence id.

        The result of a sequence with NaN in its logits is an error, which affects no other.
        """
        results = {seq_id: RunResult() for seq_id in self._seq_ids}
        if self._pending is not None:
            for seq_id, tokens in zip(self._sampling, self._pending.results(), strict=True):
                results[seq_id].sampled = tokens
        for rows in self._prompts:
            result = results[rows.seq_id]
            try:
                result.prompt_logprobs += self._prompt_logprobs(rows)
            except GenerationError as error:
                result.sampled = error
        return results


class ModelRunner(PagedModel):
    """Runs batches of the target model. Knows nothing of planning, text or requests' ends.

    Attributes:
        threads: chooses the number of threads of a pass on a CPU; ``None`` leaves torch's as it is.
    """

    def __init__(
        self,
        model: CausalLM,
        backend: AttentionBackend,
        kv: SequenceOf[LayerKV],
        block_size: int,
        device: torch.device,
    ) -> None:
        super().__init__(model, backend, kv, block_size, device)
        self.sampler = Sampler(fused=self.backend.in_triton)
        self.threads: ThreadCount | None = None

    def dry_run(
        self, num_tokens: int, longest: int, num_seqs: int = 1, max_queries: int = 1
    ) -> None:
        """Do the dry run of `PagedModel`, and compile what draws need."""
        super().dry_run(num_tokens, longest, num_seqs, max_queries)
        self.sampler.warm_up(self.device)

    def run(self, batch: SequenceOf[Scheduled]) -> dict[str, RunResult]:
        """Launch a batch and wait for its results."""
        return self.launch(batch).results()

    @torch.inference_mode()
    def launch(self, batch: SequenceOf[Scheduled]) -> InFlightBatch:
        """Hand one forward pass and the choice of tokens to the device.

        It does not wait for a GPU. It writes the KV of the scheduled tokens and changes no
        sequence, so that the same batch, or a part of it, can be run again.
        """
        if self.threads is not None:
            self.threads.before_pass()
        batch = sorted(batch, key=lambda s: not s.seq.is_decoding)
        chunks = [_chunk_of(item) for item in batch]
        hidden = self.forward(chunks, sum(item.seq.is_decoding for item in batch))
        first_rows = list(accumulate((len(chunk.token_ids) for chunk in chunks), initial=0))
        sampling = [
            (item, first) for item, first in zip(batch, first_rows, strict=False) if item.samples
        ]
        return InFlightBatch(
            [item.seq.seq_id for item in batch],
            [item.seq.seq_id for item, _ in sampling],
            self._sample(sampling, hidden) if sampling else None,
            [
                rows
                for item, first in zip(batch, first_rows, strict=False)
                if (rows := _prompt_rows(item, hidden[first:])) is not None
            ],
            self._prompt_logprobs,
        )

    def _sample(self, sampling: list[tuple[Scheduled, int]], hidden: Tensor) -> PendingTokens:
        """Choose tokens for chunks, each given with its first row."""
        rows: list[int] = []
        for item, first in sampling:
            newest = first + item.num_tokens - 1
            rows += range(newest, newest + len(item.drafted) + 1)
        if len(rows) < hidden.shape[0]:
            hidden = self.rows(hidden, rows)
        seqs = [item.seq for item, _ in sampling]
        proposals = [item.proposal for item, _ in sampling]
        return self.sampler.launch(self.model.logits(hidden), seqs, proposals)

    def _prompt_logprobs(self, rows: _PromptRows) -> list[TokenLogprob]:
        found: list[TokenLogprob] = []
        for begin in range(0, len(rows.token_ids), PROMPT_LOGPROB_ROWS):
            some = slice(begin, begin + PROMPT_LOGPROB_ROWS)
            found += self.sampler.prompt_logprobs(
                self.model.logits(rows.hidden[some]), rows.token_ids[some], rows.num_top
            )
        return found


def model_runner(runner: BatchRunner) -> ModelRunner:
    """Return the runner, for work that needs the model itself.

    Raises:
        ConfigError: where the device is simulated.
    """
    if not isinstance(runner, ModelRunner):
        raise ConfigError("a simulated device has no model to run")
    return runner


def _chunk_of(item: Scheduled) -> Chunk:
    own = item.seq.token_ids[item.start : item.end]
    return Chunk([*own, *item.drafted], item.start, item.seq.block_table)


def _prompt_rows(item: Scheduled, hidden: Tensor) -> _PromptRows | None:
    """Return the rows of a chunk that predict prompt tokens: the row of token p predicts p + 1."""
    num_top = item.seq.request.params.prompt_logprobs
    last = min(item.end, item.seq.num_prompt_tokens - 1)
    if num_top is None or item.start >= last:
        return None
    token_ids = item.seq.token_ids[item.start + 1 : last + 1]
    return _PromptRows(item.seq.seq_id, hidden[: len(token_ids)], token_ids, num_top)
