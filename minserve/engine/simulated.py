"""`SimulatedRunner`: lets a batch take the time that a performance model says, by the real clock.

All else is real: planner, block pool, text, endpoint. It serves to try out how many requests a
setup can take, and how many replicas behave together, on a machine that could not run them. (On a
virtual clock, without text and endpoint, `minserve.simulator` does the same.)
Tokens are made up, the same for the same seed and position: words, which a tokenizer splits
as they were joined, so that a chat that comes back is found in the prefix cache.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import torch

from minserve.config import EngineConfig
from minserve.devices import Device, find_device
from minserve.engine.batch import RunningBatch, RunResult, Scheduled, shape_of
from minserve.engine.block_pool import BlockPool
from minserve.engine.core import EngineCore
from minserve.engine.model_tokenizer import load_model_tokenizer
from minserve.engine.speculation.proposal import SampledToken, Verified
from minserve.engine.text.tokenizer import Tokenizer
from minserve.errors import ConfigError, GenerationError
from minserve.models.finding.source import ModelSource
from minserve.planner.policies.registry import make_planner, make_safe_planner
from minserve.planner.predict.lengths import make_length_estimator
from minserve.planner.predict.perf_model import PerfModel
from minserve.request import Sequence

TOKEN_BUDGET = 8192
# Token ids that are looked at for words.
SEARCHED = 8192
_WORD = re.compile(r" [a-z]+")
# Any odd numbers: neighbouring positions get tokens far apart.
_STEP, _SPREAD = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9


class SimulatedBatch:
    """A batch that is over at a certain time.

    Args:
        ends_at: that time, in seconds on the monotonic clock.
    """

    def __init__(
        self, batch: SequenceOf[Scheduled], ends_at: float, words: SequenceOf[int]
    ) -> None:
        self._batch, self._ends_at, self._words = batch, ends_at, words

    def sample(self, batch: SequenceOf[Scheduled]) -> None:
        """Take its sequences as they are now that the batch before is applied."""
        self._batch = batch

    def results(self) -> dict[str, RunResult]:
        """Wait for the end of the batch, and return made-up tokens."""
        # Making them is the device's work, and part of its time.
        results = {item.seq.seq_id: self._result(item) for item in self._batch}
        time.sleep(max(0.0, self._ends_at - time.monotonic()))
        return results

    def _result(self, item: Scheduled) -> RunResult:
        params = item.seq.request.params
        if params.logprobs is not None or params.prompt_logprobs is not None:
            return RunResult(GenerationError("a simulated device knows no log probabilities"))
        if not item.samples:
            return RunResult()
        token = SampledToken(made_up_token(item.seq, self._words), None)
        return RunResult(Verified((token,), 0))


class SimulatedRunner:
    """Takes the place of a `ModelRunner`.

    Args:
        words: token ids that outputs are made of.
    """

    device = torch.device("cpu")
    is_lost = False

    def __init__(self, model: PerfModel, words: SequenceOf[int]) -> None:
        self._model, self._words = model, words
        # When the device is done with all that it has been given.
        self._free_at = -math.inf

    def launch(self, batch: SequenceOf[Scheduled]) -> SimulatedBatch:
        """Begin a batch now, or when the device is done with those before it."""
        took_s = self._model.profiled(shape_of(batch, self._model.mixed))
        self._free_at = max(time.monotonic(), self._free_at) + took_s
        return SimulatedBatch(batch, self._free_at, self._words)

    def follow(self, batch: SequenceOf[Scheduled], before: RunningBatch) -> SimulatedBatch:
        """Begin a batch when the one before it, the newest one, is over."""
        return self.launch(batch)


def made_up_token(seq: Sequence, words: SequenceOf[int]) -> int:
    """Return the next token of a sequence, which is always the same one."""
    number = (seq.request.seed + seq.index) * _SPREAD + seq.num_output_tokens * _STEP
    return words[(number >> 20) % len(words)]


def find_words(tokenizer: Tokenizer) -> list[int]:
    """Return token ids of whole words with the space before them; without any, all tokens."""
    found = [
        token
        for token in range(min(tokenizer.vocab_size, SEARCHED))
        if _WORD.fullmatch(text := tokenizer.decode([token]))
        and tokenizer.encode(text, add_special_tokens=False) == [token]
    ]
    special = tokenizer.eos_token_ids
    return found or [token for token in range(tokenizer.vocab_size) if token not in special]


def load_simulated_core(
    config: EngineConfig, source: ModelSource
) -> tuple[EngineCore, Tokenizer, int]:
    """Load what an engine on the device of ``config.profile`` needs.

    Returns:
        a core, the model's tokenizer, and the most tokens of a sequence.

    Raises:
        ConfigError: where a setting does not fit a simulated device.
        WorkloadError: where the profile cannot be read.
    """
    assert config.profile is not None, "the configuration sees to it"
    device = find_device(config.profile)
    budget = TOKEN_BUDGET if config.token_budget is None else config.token_budget
    config = replace(config, token_budget=budget)  # checks the other settings against it
    if config.speculator not in ("auto", "off") or config.draft_model is not None:
        raise ConfigError("a simulated device drafts nothing; leave the speculator off")
    tokenizer = load_model_tokenizer(config, source)
    num_blocks = _num_blocks(config, device)
    planner = make_planner(
        config.policy,
        chunked_prefill=config.chunked_prefill,
        model=device.perf_model(),
        lengths=make_length_estimator(config.length_estimator),
        best_effort_share=config.best_effort_share,
    )
    longest = min(device.max_model_len, num_blocks * config.block_size)
    if config.max_model_len is not None and config.max_model_len > longest:
        raise ConfigError(
            f"max_model_len {config.max_model_len} is beyond the {longest} tokens that "
            f"{device.name} can hold"
        )
    max_model_len = config.max_model_len or longest
    core = EngineCore(
        SimulatedRunner(device.perf_model(), find_words(tokenizer)),
        BlockPool(num_blocks, config.block_size, prefix_caching=config.prefix_caching),
        planner,
        token_budget=budget,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        clock=time.monotonic,
        safe_planner=make_safe_planner(chunked_prefill=config.chunked_prefill),
        # As beside a real one. It takes more processor time, which only a GPU's host has to spare.
        plans_ahead=device.is_gpu,
        launches_ahead=device.is_gpu,
    )
    core.stats.profile_completeness = 1.0
    return core, tokenizer, max_model_len


def _num_blocks(config: EngineConfig, device: Device) -> int:
    if config.num_blocks is not None:
        return config.num_blocks
    if device.kv_tokens is None:
        raise ConfigError(
            f"the profile of {device.name} does not say how much KV memory there is; "
            "give --num-blocks"
        )
    return device.kv_tokens // config.block_size
