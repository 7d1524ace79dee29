"""`Reader`: all that is done with a request's body before the engine gets it.

It is a pure function of the body and of what is known of the model, and needs neither torch nor
a running engine, so that it can run in another process. What it takes grows with the body:
reading JSON, running the chat template, tokenizing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from minserve.errors import InvalidRequestError
from minserve.prompts import BadWordIds, TokenizedPrompt
from minserve.server.body import MAX_NAME, parse_object
from minserve.server.chat_facts import ChatFacts
from minserve.server.chat_plan import plan_answer, plan_chat, put_to_model
from minserve.server.errors import HttpError
from minserve.server.json_array import dump_json
from minserve.server.protocol import (
    GenerationCall,
    parse_chat,
    parse_completion,
    parse_detokenize,
    parse_tokenize,
)
from minserve.server.reading.structures import StructureReader
from minserve.server.responses_api.responses_call import name_own_field, parse_responses
from minserve.server.slo_http import read_slo
from minserve.slo.objectives import SLO

if TYPE_CHECKING:
    from minserve.engine.text.inputs import PromptProcessor
    from minserve.engine.text.tokenizer import Tokenizer

Endpoint = Literal["completions", "chat", "responses"]
_PARSERS: Mapping[Endpoint, Callable[[Mapping[str, Any], Mapping[str, Any]], GenerationCall]] = {
    "completions": parse_completion,
    "chat": parse_chat,
    "responses": parse_responses,
}
# So many tokens at the end of a prompt tell whether it ends with a marker of thinking.
_END = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a reader knows of the model and the engine. It can be sent to another process.

    Attributes:
        model_name: the name of the model in the API.
        prompts: tokenizes and checks prompts.
        max_queue: the most outputs that one request may ask for.
        sampling_defaults: the model's own, for requests that leave settings out.
        slo_classes, default_slo, thinking_marker: as in `EngineFace`.
        chat: what there is to know of chats with the model.
    """

    model_name: str
    tokenizer: Tokenizer
    prompts: PromptProcessor
    max_model_len: int
    vocab_size: int
    max_queue: int
    sampling_defaults: Mapping[str, Any]
    slo_classes: Mapping[str, SLO]
    default_slo: SLO | None
    thinking_marker: str | None
    chat: ChatFacts = field(default_factory=ChatFacts)


@dataclass(frozen=True, slots=True)
class ReadCall:
    """A generation that can be submitted.

    Attributes:
        call: what was asked, without its prompts.
        prompts: the prompts as token ids; their text only where the answer repeats it.
        bad_word_ids: the token sequences of its bad words.
        came_s: when the body had come, in seconds of ``time.monotonic()``.
    """

    call: GenerationCall
    prompts: list[TokenizedPrompt]
    bad_word_ids: BadWordIds
    slo: SLO | None
    came_s: float


class Reader:
    """Reads bodies for one model."""

    def __init__(self, facts: Facts, is_busy: bool = False) -> None:
        """Make a reader.

        Args:
            is_busy: true in a process that must not work for long; `generation` raises a
                `NotHereError` there where it would.
        """
        self._facts = facts
        self._structures = StructureReader(facts.prompts, is_busy)

    @property
    def is_stuck(self) -> bool:
        """True once something was given up that may go on for ever: the process should end."""
        return self._structures.is_stuck

    def generation(
        self, raw: bytes, came_s: float, endpoint: Endpoint, headers: Mapping[str, str]
    ) -> ReadCall:
        """Read the body of a completion, a chat or a response.

        Args:
            came_s: for the result.
            headers: those of the request that say something of its SLO.

        Raises:
            InvalidRequestError: if a field is wrong; the error names it.
            HttpError: 404 for another model.
            NotHereError: in a busy process, for a body with a structure.
        """
        call = _PARSERS[endpoint](parse_object(raw), self._facts.sampling_defaults)
        try:
            return self._read(call, came_s, headers)
        except InvalidRequestError as error:
            if endpoint == "responses":
                name_own_field(error)
            raise

    def _read(self, call: GenerationCall, came_s: float, headers: Mapping[str, str]) -> ReadCall:
        """Read what a parsed body asks of this model."""
        facts = self._facts
        slo = read_slo(call.slo, headers, facts)
        self._check_model(call.model)
        if call.chat:
            self._require_chat_template()
        num_outputs = len(call.prompts) * call.params.n
        if num_outputs > facts.max_queue:  # before so many prompts are tokenized
            raise InvalidRequestError(
                f"{num_outputs} outputs in one request; at most {facts.max_queue} can be queued here"
            )
        if call.chat:
            call = plan_chat(call, facts.chat)
        structure = call.params.structure
        if structure is not None:
            structure = self._structures.read(structure)
            call = replace(call, params=replace(call.params, structure=structure))
        bad_word_ids = facts.prompts.bad_word_ids(call.params.bad_words)
        prompts = []
        for prompt in call.prompts:
            one = facts.prompts.process(prompt, call.prompt_options)
            prompts.append(one if call.echo else one._replace(text=None))
        if call.chat:
            end = facts.tokenizer.decode(prompts[0].token_ids[-_END:], skip_special_tokens=False)
            call = plan_answer(call, end, facts.chat)
            if slo is not None and call.thinks_no_more and facts.thinking_marker is not None:
                slo = slo.behind(facts.thinking_marker)
        return ReadCall(replace(call, prompts=[]), prompts, bad_word_ids, slo, came_s)

    def tokenized(self, raw: bytes) -> tuple[bytes, tuple[str, ...]]:
        """Answer a body of /tokenize.

        Returns:
            The answer as JSON, and the names of hints that changed nothing.

        Raises:
            InvalidRequestError: if a field is wrong; the error names it.
            HttpError: 404 for another model.
        """
        call = parse_tokenize(parse_object(raw))
        self._check_model(call.model)
        prompt, options = call.prompt, call.prompt_options
        unknown: list[str] = []
        if not isinstance(prompt, str):
            self._require_chat_template()
            prompt, options, unknown = put_to_model(
                prompt, options, call.tool_use, call.thinking, self._facts.chat
            )
        tokens = self._facts.prompts.tokenize(prompt, options).token_ids
        most = self._facts.max_model_len
        answer = {"tokens": tokens, "count": len(tokens), "max_model_len": most}
        if call.return_token_strs:
            answer["token_strs"] = [self._facts.tokenizer.token_text(token) for token in tokens]
        return dump_json(answer), (*call.ignored, *unknown)

    def detokenized(self, raw: bytes) -> bytes:
        """Return the answer to a body of /detokenize, as JSON; special tokens are written out.

        Raises:
            InvalidRequestError: if a field is wrong; the error names it.
            HttpError: 404 for another model.
        """
        model, tokens = parse_detokenize(parse_object(raw))
        self._check_model(model)
        vocab_size = self._facts.vocab_size
        for token in tokens:
            if token >= vocab_size:
                raise InvalidRequestError(
                    f"tokens: {token} is outside the vocabulary of {vocab_size}", "tokens"
                )
        text = self._facts.tokenizer.decode(tokens, skip_special_tokens=False)
        return dump_json({"prompt": text})

    def _check_model(self, name: str | None) -> None:
        if name is not None:
            check_model(name, self._facts.model_name)

    def _require_chat_template(self) -> None:
        if not self._facts.tokenizer.has_chat_template:
            raise InvalidRequestError(
                "this model has no chat template; use /v1/completions, or start the server with "
                "--chat-template FILE",
                "messages",
            )


def check_model(name: str, served: str) -> None:
    """Check the name of a model that a client asks for.

    Raises:
        HttpError: 404 for another one than that which is served.
    """
    if name != served:
        raise HttpError(
            404,
            f"the model {name[:MAX_NAME]!r} is not served here; this server has {served!r}",
            param="model",
            code="model_not_found",
        )
