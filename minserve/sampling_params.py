"""How the next token is chosen and when a request ends. Knows nothing of torch or HTTP."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minserve.errors import InvalidRequestError
from minserve.structure import Structure

MAX_LOGPROBS = 100
MAX_N = 128
MAX_STOP_STRINGS, MAX_STOP_LENGTH = 64, 8192
# What these name is looked up for each token of the output.
MAX_NAMED_TOKENS = 1024
MAX_BAD_WORDS, MAX_BAD_WORDS_LENGTH = 256, 8192
MAX_TOP_K = 2**31 - 1
SEED_MIN, SEED_MAX = -(2**63), 2**64 - 1
# A number has one form, so that two keys never name the same token.
_DECIMAL = re.compile(r"0|[1-9][0-9]{0,19}", re.ASCII)
# transformers' names of the settings in generation_config.json that count, and the fields of
# `SamplingParams` that they set. ``do_sample`` is none of them, as in vLLM: it says what
# transformers' own `generate` does unasked, and clients of this API choose by the temperature.
GENERATION_CONFIG_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling settings of one request.

    Attributes:
        n: how many independent outputs to generate for the prompt.
        max_tokens: most output tokens; ``None`` means as many as the model's own
            ``max_new_tokens`` allows (generation_config.json), or else its length.
        min_tokens: end-of-sequence and stop token ids are not sampled before this
            many output tokens, and stop strings that are complete before do not end the
            output.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the smallest set of most likely tokens with at least this mass.
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        min_p: drop tokens less likely than ``min_p`` times the most likely one.
        seed: makes sampled output reproducible: whatever else is in the batch, only a near tie
            between two tokens may be decided otherwise, by rounding. Output ``i`` of ``n`` uses
            the stream ``(seed, i)``.
        presence_penalty: subtracted from the logit of a token already generated.
        frequency_penalty: subtracted once per time that a token was generated.
        repetition_penalty: divides positive (multiplies negative) logits of tokens
            seen in the prompt or the output (Keskar et al., 2019, CTRL).
        logit_bias: added to the logits of these token ids, -100 to 100, before penalties. Ids
            may be written as decimal strings, as in JSON.
        allowed_token_ids: the only token ids that are sampled, those that end the output
            included; none named allows all.
        bad_words: strings that the output never holds as the tokenizer writes them, with a
            space before them or without: the last token that completes one is not sampled.
        stop: strings that end the output; they are not part of its text.
        stop_token_ids: token ids that end the output, kept in ``token_ids`` but
            not in the text.
        include_stop_str_in_output: the text ends with the stop string, or with the text of the
            stop token (which ``skip_special_tokens`` may leave out), and not before it.
        ignore_eos: do not stop at the model's end-of-sequence token.
        logprobs: how many alternatives to report per output token (0: only the
            sampled one); ``None``: no log probabilities. They are of the model's
            raw distribution, before temperature, penalties and truncation.
        prompt_logprobs: the same for the prompt's tokens.
        skip_special_tokens: leave special tokens out of the text.
        preserved_tokens: special tokens, as they are written, that stay in the text all the same.
        structure: the form that the output has, such as that of a JSON schema; tokens that
            would break it are not sampled.

    Raises:
        InvalidRequestError: on any value outside its range, naming the field.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict, hash=False)
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    preserved_tokens: tuple[str, ...] = ()
    structure: Structure | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", _tuple("stop", stop, "a string or a list of strings"))
        ids = _tuple("stop_token_ids", self.stop_token_ids, "a list of token ids")
        object.__setattr__(self, "stop_token_ids", ids)
        ids = _tuple("allowed_token_ids", self.allowed_token_ids, "a list of token ids")
        object.__setattr__(self, "allowed_token_ids", ids)
        words = _tuple("bad_words", self.bad_words, "a list of strings")
        object.__setattr__(self, "bad_words", words)
        kept = _tuple("preserved_tokens", self.preserved_tokens, "a list of strings")
        object.__setattr__(self, "preserved_tokens", kept)
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        if self.top_k == -1 and not isinstance(self.top_k, bool):
            object.__setattr__(self, "top_k", 0)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise InvalidRequestError(f"{name} must be true or false, not {value!r:.80}", name)
        if self.structure is not None and not isinstance(self.structure, Structure):
            raise InvalidRequestError(
                f"structure must be a Structure, not {self.structure!r:.80}", "structure"
            )
        self._check_integers()
        self._check_numbers()
        self._check_stops()
        self._check_named()

    def _check_integers(self) -> None:
        _integer("n", self.n, 1, MAX_N)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1)
        _integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens ({self.min_tokens}) is larger than max_tokens ({self.max_tokens})",
                "min_tokens",
            )
        _integer("top_k", self.top_k, 0, MAX_TOP_K)
        if self.seed is not None:
            _integer("seed", self.seed, SEED_MIN, SEED_MAX)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)

    def _check_numbers(self) -> None:
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise InvalidRequestError("top_p must be above 0", "top_p")
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(f"at most {MAX_STOP_STRINGS} stop strings", "stop")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise InvalidRequestError("stop must hold non-empty strings", "stop")
        if sum(map(len, self.stop)) > MAX_STOP_LENGTH:
            raise InvalidRequestError(
                f"stop strings hold at most {MAX_STOP_LENGTH} characters together", "stop"
            )
        if len(self.stop_token_ids) > MAX_NAMED_TOKENS:
            raise InvalidRequestError(
                f"at most {MAX_NAMED_TOKENS} stop token ids", "stop_token_ids"
            )
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0)

    def _check_named(self) -> None:
        """Check the tokens and words that the settings name one by one."""
        for name in ("logit_bias", "allowed_token_ids"):
            if len(getattr(self, name)) > MAX_NAMED_TOKENS:
                raise InvalidRequestError(f"{name} holds at most {MAX_NAMED_TOKENS} tokens", name)
        for token in self.allowed_token_ids:
            _integer("allowed_token_ids", token, 0)
        if len(self.preserved_tokens) > MAX_NAMED_TOKENS:
            raise InvalidRequestError(
                f"preserved_tokens holds at most {MAX_NAMED_TOKENS} tokens", "preserved_tokens"
            )
        for text in self.preserved_tokens:
            if not isinstance(text, str) or not text:
                raise InvalidRequestError(
                    "preserved_tokens must hold non-empty strings", "preserved_tokens"
                )
        if len(self.bad_words) > MAX_BAD_WORDS:
            raise InvalidRequestError(f"at most {MAX_BAD_WORDS} bad words", "bad_words")
        for text in self.bad_words:
            if not isinstance(text, str) or not text:
                raise InvalidRequestError("bad_words must hold non-empty strings", "bad_words")
        if sum(map(len, self.bad_words)) > MAX_BAD_WORDS_LENGTH:
            raise InvalidRequestError(
                f"bad_words hold at most {MAX_BAD_WORDS_LENGTH} characters together", "bad_words"
            )

    @property
    def greedy(self) -> bool:
        """True where the most likely token is always taken."""
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def has_penalties(self) -> bool:
        """True where earlier tokens change the logits."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

    @property
    def adjusts_logits(self) -> bool:
        """True where a token is not chosen by the model's own logits."""
        return self.has_penalties or bool(
            self.logit_bias or self.allowed_token_ids or self.bad_words or self.structure
        )


def _integer(name: str, value: object, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(f"{name} must be an integer, not {value!r:.80}", name)
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InvalidRequestError(f"{name} must be {bound}, not {value!s:.40}", name)


def _tuple(name: str, value: object, wanted: str) -> tuple:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise InvalidRequestError(f"{name} must be {wanted}, not {value!r:.80}", name)
    return tuple(value)


def _biases(value: object) -> dict[int, float]:
    name = "logit_bias"
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"{name} must map token ids to numbers, not {value!r:.80}", name)
    biases = {}
    for key, bias in value.items():
        token = int(key) if isinstance(key, str) and _DECIMAL.fullmatch(key) else key
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise InvalidRequestError(f"{name} names the token {key!r:.40}, which is no id", name)
        _number(f"{name}[{token}]", bias, -100.0, 100.0, name)
        biases[token] = float(bias)
    return biases


def _number(name: str, value: object, low: float, high: float, param: str | None = None) -> None:
    """Check a number. ``param`` is the field, where ``name`` is a part of it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:  # NaN
        raise InvalidRequestError(
            f"{name} must be a number, not {value!r:.80}", name if param is None else param
        )
    if not low <= value <= high:
        raise InvalidRequestError(
            f"{name} must be between {low:g} and {high:g}, not {value!s:.40}",
            name if param is None else param,
        )


def default_words(defaults: Mapping[str, Any]) -> str:
    """Return the settings in words, such as ``temperature 0.6; max_tokens 12 for chats``.

    Args:
        defaults: fields of `SamplingParams`, by name.
    """
    words = ", ".join(f"{name} {value}" for name, value in defaults.items() if name != "max_tokens")
    limit = f"max_tokens {defaults['max_tokens']} for chats" if "max_tokens" in defaults else ""
    return "; ".join(one for one in (words, limit) if one)
