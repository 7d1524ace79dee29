"""`ModelRunner` runs a batch of sequences in one mixed forward pass and samples their tokens."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch
from torch import Tensor

from minserve.engine.batch import BatchRunner, RunningBatch, RunResult, Scheduled
from minserve.engine.device import transfers
from minserve.engine.device.batch_tensors import Chunk, unknown_token
from minserve.engine.device.paged_model import PagedModel
from minserve.engine.device.thread_count import ThreadCount
from minserve.engine.sampling.rehearsal import rehearse
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
    """A batch that was handed to the device: its pass and its logits are queued.

    `sample` queues the choice of tokens, and `results` waits for what the batch gives.

    Args:
        runner: whose batch it is.
        logits: ``[rows, vocab]``; ``None`` where no sequence gets a token.
        rows: the rows of each sequence that gets one: behind its newest token, and behind each
            drafted one.
    """

    def __init__(
        self,
        runner: ModelRunner,
        logits: Tensor | None,
        rows: Mapping[str, range],
        prompts: SequenceOf[_PromptRows],
    ) -> None:
        self._runner = runner
        self._logits = logits
        self._rows = rows
        self._prompts = prompts
        self._seq_ids: list[str] = []
        self._sampling: list[str] = []
        self._pending: PendingTokens | None = None
        self._end: transfers.Milestone | None = None

    @torch.inference_mode()
    def sample(self, batch: SequenceOf[Scheduled]) -> None:
        """Queue the choice of tokens, and their way to the host.

        Args:
            batch: what was launched, without those that want no token any more. The newest tokens
                of its sequences are known by now.
        """
        rows = self._rows
        self._seq_ids = [item.seq.seq_id for item in batch]
        sampling = [item for item in batch if item.seq.seq_id in rows]
        if not sampling:
            self._end = transfers.Milestone(self._runner.device)
            return
        sampling.sort(key=lambda item: rows[item.seq.seq_id].start)
        self._sampling = [item.seq.seq_id for item in sampling]
        logits = self._logits
        assert logits is not None, "there are rows"
        if len(sampling) < len(rows):
            left = [row for seq_id in self._sampling for row in rows[seq_id]]
            logits = self._runner.rows(logits, left)
        seqs, proposals = [item.seq for item in sampling], [item.proposal for item in sampling]
        self._pending = self._runner.sampler.launch(logits, seqs, proposals)
        self._logits = None

    def newest_tokens(self) -> tuple[dict[str, int], Tensor | None]:
        """Return the tokens that were chosen, for the batch that follows.

        Returns:
            By sequence id, the row of its token, and the tokens, int64 ``[rows]`` on the device;
            `INVALID` is 0 there, as what follows it will not be wanted. ``None`` for no tokens.
        """
        if self._pending is None:
            return {}, None
        rows = {seq_id: row for row, seq_id in enumerate(self._sampling)}
        return rows, self._pending.ids.clamp(min=0)

    @torch.inference_mode()
    def results(self) -> dict[str, RunResult]:
        """Wait for the device and return the results by sequence id.

        The result of a sequence with NaN in its logits is an error, which affects no other.
        """
        results = {seq_id: RunResult() for seq_id in self._seq_ids}
        if self._pending is not None:
            for seq_id, tokens in zip(self._sampling, self._pending.results(), strict=True):
                results[seq_id].sampled = tokens
        elif self._end is not None:
            self._end.wait()
        if self._runner.company is not None:
            self._runner.company.check()  # a sum that was broken off lets a pass end all the same
        for rows in self._prompts:
            result = results.get(rows.seq_id)
            if result is None:
                continue
            try:
                result.prompt_logprobs += self._runner.log_probs_of(rows)
            except GenerationError as error:
                result.sampled = error
        return results


class ModelRunner(PagedModel):
    """Runs batches of the target model. Knows nothing of planning, text or requests' ends.

    Attributes:
        threads: chooses the number of threads of a pass on a CPU; ``None`` leaves torch's as it is.
        drafts_by_chance: whether drafts come from a model that draws them.
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
        self.drafts_by_chance = False

    def _rehearse(self, logits: Tensor, max_queries: int) -> None:
        """Draw what may be drawn of the largest batch, where memory and kernels depend on it."""
        if transfers.runs_behind(self.device):
            num_seqs, most_drafted = len(logits) // max_queries, max_queries - 1
            rehearse(self.sampler, logits, num_seqs, most_drafted, by_chance=self.drafts_by_chance)

    def run(self, batch: SequenceOf[Scheduled]) -> dict[str, RunResult]:
        """Launch a batch and wait for its results."""
        return self.launch(batch).results()

    def launch(self, batch: SequenceOf[Scheduled]) -> InFlightBatch:
        """Hand one forward pass and the choice of tokens to the device.

        It does not wait for a GPU. It writes the KV of the scheduled tokens and changes no
        sequence, so that the same batch, or a part of it, can be run again.
        """
        launched = self._launch(batch, {}, None)
        launched.sample(batch)
        return launched

    @torch.inference_mode()
    def follow(self, batch: SequenceOf[Scheduled], before: RunningBatch) -> InFlightBatch:
        """Hand the next forward pass to the device, behind a batch whose tokens are not read yet.

        They go from the sampler to this pass on the device. What this one samples is chosen
        later: `InFlightBatch.sample`.

        Args:
            batch: as it will be when the batch before has ended; see `Sequence.ahead`.
            before: the newest batch; it was sampled, and nothing of it was drafted.
        """
        assert isinstance(before, InFlightBatch), "this runner's own"
        return self._launch(batch, *before.newest_tokens())

    @torch.inference_mode()
    def _launch(
        self, batch: SequenceOf[Scheduled], unread: Mapping[str, int], newest: Tensor | None
    ) -> InFlightBatch:
        """Queue a forward pass, and the logits of the rows that get a token.

        Args:
            unread: by sequence id, the row of ``newest`` that is its newest token.
        """
        if self.threads is not None:
            self.threads.before_pass()
        batch = sorted(batch, key=lambda s: not s.seq.is_decoding)
        chunks = [_chunk_of(item, unread.get(item.seq.seq_id)) for item in batch]
        hidden = self.forward(chunks, sum(item.seq.is_decoding for item in batch), newest)
        rows: dict[str, range] = {}
        places: list[int] = []  # among the hidden states
        prompts: list[_PromptRows] = []
        first = 0
        for item, chunk in zip(batch, chunks, strict=True):
            if item.samples:
                end = first + len(chunk.token_ids)
                begin = end - len(item.drafted) - 1
                rows[item.seq.seq_id] = range(len(places), len(places) + end - begin)
                places += range(begin, end)
            if (wanted := _prompt_rows(item, hidden[first:])) is not None:
                prompts.append(wanted)
            first += len(chunk.token_ids)
        logits = None
        if places:
            chosen = hidden if len(places) == len(hidden) else self.rows(hidden, places)
            logits = self.logits(chosen)
        return InFlightBatch(self, logits, rows, prompts)

    def log_probs_of(self, rows: _PromptRows) -> list[TokenLogprob]:
        """Return the log probabilities of a piece of a prompt; this waits for the device.

        Raises:
            GenerationError: where the logits contain NaN.
        """
        found: list[TokenLogprob] = []
        for begin in range(0, len(rows.token_ids), PROMPT_LOGPROB_ROWS):
            some = slice(begin, begin + PROMPT_LOGPROB_ROWS)
            found += self.sampler.prompt_logprobs(
                self.logits(rows.hidden[some]), rows.token_ids[some], rows.num_top
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


def _chunk_of(item: Scheduled, unread: int | None) -> Chunk:
    """Return what a sequence runs.

    Args:
        unread: the row of the device's newest tokens that is its newest one, and all that it runs;
            ``None`` where the sequence knows its tokens.
    """
    if unread is not None:
        return Chunk([unknown_token(unread)], item.start, item.seq.block_table)
    own = item.seq.token_ids[item.start : item.end]
    return Chunk([*own, *item.drafted], item.start, item.seq.block_table)


def _prompt_rows(item: Scheduled, hidden: Tensor) -> _PromptRows | None:
    """Return the rows of a chunk that predict prompt tokens: the row of token p predicts p + 1."""
    num_top = item.seq.request.params.prompt_logprobs
    last = min(item.end, item.seq.num_prompt_tokens - 1)
    if num_top is None or item.start >= last:
        return None
    token_ids = item.seq.token_ids[item.start + 1 : last + 1]
    # A copy, because another pass may have been recorded into the same memory before it is read.
    return _PromptRows(item.seq.seq_id, hidden[: len(token_ids)].clone(), token_ids, num_top)
