"""`Intake` makes a checked `Request` from what a caller asks for. It needs no weights.

An engine has one; so has a controller of several engines, which draws seeds and resolves
promises before it chooses who runs them.
"""

from __future__ import annotations

import logging
import random
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from minserve.config import EngineConfig
from minserve.engine.model_tokenizer import load_model_tokenizer
from minserve.engine.promises import Promises
from minserve.engine.sampling_defaults import load_sampling_defaults
from minserve.engine.tasks import Tasks
from minserve.engine.text.inputs import PromptProcessor
from minserve.engine.text.tokenizer import Tokenizer
from minserve.errors import (
    InvalidRequestError,
    InvalidSLOError,
    QueueFullError,
    RequestTooLongError,
)
from minserve.models.finding.source import find_model
from minserve.planner.policies.registry import planner_class, promising_policies
from minserve.planner.predict.perf_model import PerfModel
from minserve.prompts import BadWordIds, Prompt
from minserve.request import Request
from minserve.sampling_params import SamplingParams
from minserve.slo.objectives import SLO, Targets

log = logging.getLogger(__name__)


def load_tokenizer(config: EngineConfig) -> Tokenizer:
    """Load the tokenizer of a model, without the model.

    Raises:
        ModelLoadError: where it cannot be read.
        ConfigError: where there is no such chat template as the settings ask for.
    """
    return load_front(config)[0]


def load_front(config: EngineConfig) -> tuple[Tokenizer, dict[str, Any]]:
    """Load what is needed to take requests for a model that runs elsewhere.

    Returns:
        its tokenizer, and its sampling defaults.

    Raises:
        ModelLoadError: where the tokenizer cannot be read.
        ConfigError: where there is no such chat template as the settings ask for.
    """
    source = find_model(config.model)
    tokenizer = load_model_tokenizer(config, source)
    return tokenizer, load_sampling_defaults(config, source)


def warm_up_chats(tokenizer: Tokenizer, model_name: str) -> None:
    """Load what the first chat needs, so that no request waits for it.

    Templates that no chat can use are named in the log.
    """
    if not tokenizer.has_chat_template:
        return
    for name, problem in tokenizer.broken_chat_templates().items():
        log.warning(
            "%s: chats will be refused, for its chat template %r is no valid jinja template: %s; "
            "give another one by --chat-template",
            model_name,
            name,
            problem,
        )
    # A template may refuse this chat; by then it is loaded.
    with suppress(InvalidRequestError):
        tokenizer.render_chat([{"role": "user", "content": "Hello"}])


def check_room(num_outputs: int, num_unfinished: int, max_queue: int, num_engines: int = 1) -> None:
    """Check that a call's outputs may be queued.

    Args:
        num_unfinished: the number of outputs that wait or run already.
        max_queue: the most outputs of each engine.

    Raises:
        InvalidRequestError: for more than any engine ever takes.
        QueueFullError: for more than there is room for now.
    """
    if num_outputs > max_queue:
        raise InvalidRequestError(
            f"{num_outputs} outputs in one request; at most {max_queue} can be queued here"
        )
    most = max_queue * num_engines
    if num_unfinished + num_outputs > most:
        raise QueueFullError(
            f"{num_unfinished} outputs are waiting or running and {num_outputs} more "
            f"would exceed the limit of {most}; try again later"
        )


class _ResolvedSettings(NamedTuple):
    """What sampling settings mean for a model, whatever the prompt is.

    Attributes:
        params: the settings themselves.
        ends, bad_word_ids: as in `Request`.
    """

    params: SamplingParams
    ends: frozenset[int]
    bad_word_ids: BadWordIds


class Intake:
    """Checks requests against a model, and resolves their open settings.

    Args:
        max_model_len, vocab_size: the model's.
        clock: tells monotonic seconds.
        sampling_defaults: the model's own, from `load_sampling_defaults`.

    Attributes:
        prompts: turns prompts into token ids.
        perf_model: the device's speed, of which slowdowns are multiples; ``None`` until it is
            known.
        tasks: the tasks of which requests are calls.
    """

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer,
        *,
        max_model_len: int,
        vocab_size: int,
        clock: Callable[[], float],
        sampling_defaults: Mapping[str, Any],
    ) -> None:
        self._config, self._clock = config, clock
        self.tokenizer = tokenizer
        self.max_model_len, self.vocab_size = max_model_len, vocab_size
        self.promises = Promises(config, tokenizer)
        self.perf_model: PerfModel | None = None
        self.tasks = Tasks(clock, lambda: self.perf_model)
        self._default_max_tokens: int | None = sampling_defaults.get("max_tokens")
        self.prompts = PromptProcessor(tokenizer, vocab_size, max_model_len)
        self._seeds = random.Random(config.seed)
        # A call may have a thousand prompts, and settings that name a thousand tokens and words.
        self._newest: _ResolvedSettings | None = None

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        priority: int = 0,
        cache_salt: str = "",
        slo: SLO | str | None = None,
        age_s: float = 0.0,
        bad_word_ids: BadWordIds | None = None,
    ) -> tuple[str | None, Request]:
        """Return the prompt's text (``None`` for token ids) and the request.

        Args:
            age_s: seconds since it arrived; until now it was read.
            bad_word_ids: of the params' bad words, where they are tokenized already.

        Raises:
            InvalidRequestError: where it can never be served as it stands.
            InvalidSLOError: for an unknown class, or a promise that the policy cannot make.
        """
        tokenized = self.prompts.process(prompt)
        text, token_ids = tokenized.text, tokenized.token_ids
        max_tokens = self._max_tokens(params, len(token_ids))
        slo = self.promises.find(slo)
        settings = self._settings(params, bad_word_ids)
        return text, Request(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=token_ids,
            params=(
                params
                if params.max_tokens == max_tokens
                else replace(params, max_tokens=max_tokens)
            ),
            seed=self._seeds.getrandbits(64) if params.seed is None else params.seed,
            arrival_s=self._clock() - age_s,
            priority=priority,
            cache_salt=cache_salt,
            stop_token_ids=settings.ends,
            bad_word_ids=settings.bad_word_ids,
            slo=slo,
            targets=None if slo is None else self._targets(slo, len(token_ids)),
        )

    def _max_tokens(self, params: SamplingParams, num_prompt_tokens: int) -> int:
        room = self.max_model_len - num_prompt_tokens
        max_tokens = params.max_tokens
        if max_tokens is None:
            default = self._default_max_tokens
            max_tokens = room if default is None else min(room, max(default, params.min_tokens))
        if max_tokens > room:
            # OpenAI's words, whatever the prompt is: clients look for them, and for the code.
            raise RequestTooLongError(
                f"This model's maximum context length is {self.max_model_len} tokens. However, you "
                f"requested {num_prompt_tokens + max_tokens} tokens ({num_prompt_tokens} in the "
                f"messages, {max_tokens} in the completion). Please reduce the length of the "
                "messages or completion. (context_length_exceeded)",
                "max_tokens",
            )
        if params.min_tokens > max_tokens:
            raise InvalidRequestError(
                f"min_tokens {params.min_tokens} leaves no room: the prompt allows {max_tokens}",
                "min_tokens",
            )
        return max_tokens

    def _settings(
        self, params: SamplingParams, bad_word_ids: BadWordIds | None
    ) -> _ResolvedSettings:
        """Return what settings mean; worked out once for all prompts of a call."""
        newest = self._newest
        if newest is None or newest.params is not params:
            newest = self._newest = self._worked_out(params, bad_word_ids)
        return newest

    def _worked_out(
        self, params: SamplingParams, bad_word_ids: BadWordIds | None
    ) -> _ResolvedSettings:
        if params.structure is not None and self._config.executor == "simulated":
            raise params.structure.refusal("cannot be held: a simulated device makes its words up")
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token in getattr(params, name):
                if token >= self.vocab_size:
                    raise InvalidRequestError(
                        f"{name}: {token} is outside the vocabulary of {self.vocab_size}", name
                    )
        # Files of models may name ids that the model's head does not have. It samples none of them.
        eos = () if params.ignore_eos else self.tokenizer.eos_token_ids
        ends = frozenset(i for i in eos if i < self.vocab_size) | frozenset(params.stop_token_ids)
        if bad_word_ids is None:
            bad_word_ids = self.prompts.bad_word_ids(params.bad_words)
        self._check_choice(params, ends, bad_word_ids)
        return _ResolvedSettings(params, ends, bad_word_ids)

    def _check_choice(
        self, params: SamplingParams, ends: frozenset[int], bad_word_ids: BadWordIds
    ) -> None:
        """Check that something may be the first token.

        Raises:
            InvalidRequestError: where all that is allowed is forbidden too.
        """
        banned = {ids[0] for ids in bad_word_ids if len(ids) == 1}
        if params.min_tokens:
            banned |= ends
        if banned.issuperset(params.allowed_token_ids or range(self.vocab_size)):
            name = "allowed_token_ids" if params.allowed_token_ids else "stop_token_ids"
            raise InvalidRequestError(
                f"{name} leaves no token: bad_words and min_tokens forbid all of them", name
            )

    def _targets(self, slo: SLO, num_prompt_tokens: int) -> Targets:
        policy = self._config.policy
        if slo.refuses_delay and not planner_class(policy).promises:
            raise InvalidSLOError(
                f"policy {policy} promises nothing, so it cannot refuse what it "
                f"cannot keep; use one of {', '.join(promising_policies())}",
                "slo.on_unattainable",
            )
        return self.promises.targets(slo, num_prompt_tokens, self.perf_model)
