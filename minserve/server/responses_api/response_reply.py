"""`ResponseReply`: the answer to one request to /v1/responses, whole or as a stream of events."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from minserve.outputs import OutputDelta
from minserve.request import FinishReason
from minserve.server.answer.parts import Reasoning
from minserve.server.answer.thinking_tokens import ThinkingTokens
from minserve.server.engine_face import Handle
from minserve.server.errors import HttpError, error_body
from minserve.server.json_array import dump_pieces
from minserve.server.logprobs import ChatLogprobs, LogprobWriter
from minserve.server.prompt_choices import PromptChoices
from minserve.server.reply_base import ReplyBase
from minserve.server.responses_api.output_items import Event, OutputItems
from minserve.server.responses_api.responses_call import ResponsesCall
from minserve.server.slo_http import slo_object

if TYPE_CHECKING:
    from minserve.engine.text.tokenizer import Tokenizer


class ResponseReply(ReplyBase):
    """Builds a response of one output.

    Args:
        call: the parsed body.
        handles: the engine's handle of its one prompt.
        model: the model's name in the API.
        tokenizer: for the texts of tokens.
    """

    names_events = True

    def __init__(
        self,
        call: ResponsesCall,
        handles: Sequence[Handle],
        model: str,
        tokenizer: Tokenizer,
    ) -> None:
        (handle,) = handles
        self._writer = LogprobWriter(tokenizer)
        self._choices = PromptChoices(handle, call, tokenizer, self._writer)
        super().__init__(call, f"resp_{uuid.uuid4().hex}", model, [self._choices])
        self.has_large_events = call.params.logprobs is not None
        (self._choice,) = self._choices.choices
        self._output = OutputItems()
        # Of tokens whose text has not come yet; and the thinking, which has none.
        self._logprobs = ChatLogprobs()
        self._thinking = None
        if call.form is not None and call.form.separates and call.form.reasoning is not None:
            self._thinking = ThinkingTokens(
                call.form.reasoning, tokenizer.token_bytes, is_open=call.form.is_open
            )
        self._ended = self._is_cut = False
        self._num_events = 0
        self._head = {
            "id": self.answer_id,
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            **call.told,
        }

    def chunks(self, prompt: int, delta: OutputDelta) -> list[Event]:
        """Return the events that can be sent after a delta.

        The first ones come with the first token. Until then an error can be told by its status.
        """
        events = []
        if not self._num_events:
            for name in ("created", "in_progress"):
                response = self._response("in_progress")
                events.append({"type": f"response.{name}", "response": response})
        return self._numbered(events + self._take(delta))

    def last_chunks(self) -> list[Event]:
        """Return the event of the end, with the whole response."""
        return self._numbered([self._final_event(self._final())])

    def failure(self, error: HttpError) -> list[Event]:
        """Return the event of a failure, with what there is of the response, and the error.

        The error has OpenAI's documented form for events, and beside it the form of all errors,
        which OpenAI's clients raise. It comes alone where the stream has told of no response yet.
        """
        told = {"code": error.code, "message": error.message, "param": error.param}
        events: list[Event] = [{"type": "error", **told, **error_body(error)}]
        if self._num_events:
            self._output.end(complete=False)
            code = "rate_limit_exceeded" if error.status == 429 else "server_error"
            response = {
                **self._response("failed"),
                "error": {"code": code, "message": error.message},
                "usage": self._usage(),
            }
            events.insert(0, self._final_event(response))
        return self._numbered(events)

    def add(self, prompt: int, delta: OutputDelta) -> None:
        """Write a delta for `body`."""
        self._take(delta)

    def body(self) -> Iterator[bytes]:
        """Yield the whole response's JSON in pieces."""
        return dump_pieces(self._final())

    def _take(self, delta: OutputDelta) -> list[Event]:
        """Append a delta's text to the output."""
        if self._ended:
            return []
        self._note_logprobs(delta)
        events = []
        for part in self._choices.parse(delta):
            if isinstance(part, Reasoning):
                events += self._output.add(part)
            else:
                logprobs, self._logprobs = self._logprobs.content, ChatLogprobs()
                events += self._output.add(part, logprobs)
        if self._choice.is_done or delta.finish_reason is not None:
            self._ended = True
            self._is_cut = not self._choice.is_done and delta.finish_reason is FinishReason.LENGTH
            if (
                not self._is_cut
                and self._choice.parser is not None
                and self._choice.parser.num_calls
            ):
                self._ends_in_calls(delta.finish_reason)
            events += self._output.end(complete=not self._is_cut)
        return events

    def _note_logprobs(self, delta: OutputDelta) -> None:
        """Write the log probabilities of tokens behind the thinking, for the text that they become.

        Beside a call, tokens of its markers may be among them.
        """
        for entry in delta.logprobs or ():
            if self._thinking is not None and not self._thinking.is_over:
                self._thinking.add([entry.token_id])
                if self._thinking.count:
                    self._logprobs = ChatLogprobs()
                    continue
            self._writer.chat(self._logprobs, [entry])

    def _final(self) -> dict[str, Any]:
        """Return the response of an output that has ended."""
        if self._is_cut:
            response = self._response("incomplete")
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            response = {**self._response("completed"), "completed_at": int(time.time())}
        return {**response, "usage": self._usage()}

    def _response(self, status: str) -> dict[str, Any]:
        return {
            **self._head,
            "status": status,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "output": self._output.items(),
            "usage": None,
        }

    @staticmethod
    def _final_event(response: dict[str, Any]) -> Event:
        return {"type": f"response.{response['status']}", "response": response}

    def _numbered(self, events: list[Event]) -> list[Event]:
        for event in events:
            event["sequence_number"] = self._num_events
            self._num_events += 1
        return events

    def _usage(self) -> dict[str, Any]:
        choices = self._choices
        num_input = len(choices.handle.prompt_token_ids)
        usage: dict[str, Any] = {
            "input_tokens": num_input,
            "input_tokens_details": {
                "cached_tokens": choices.num_cached_tokens,
                # What is not there yet is computed, and is in the cache then.
                "cache_write_tokens": num_input - choices.num_cached_tokens,
            },
            "output_tokens": choices.num_output_tokens,
            "output_tokens_details": {"reasoning_tokens": choices.num_thinking_tokens},
            "total_tokens": num_input + choices.num_output_tokens,
        }
        if (report := self.slo_report()) is not None:
            usage["slo"] = slo_object(report)
        return usage
