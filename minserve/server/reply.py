"""OpenAI's response bodies and stream chunks, built from the engine's deltas.

`Reply` belongs to one HTTP request: up to several prompts, each with ``n`` choices.
Choice ``prompt * n + output`` of the response is output ``output`` of prompt ``prompt``.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from minserve.outputs import OutputDelta, acceptance
from minserve.request import FinishReason
from minserve.server.chunk_frame import PLACEHOLDER, ChunkFrame
from minserve.server.engine_face import Handle
from minserve.server.errors import HttpError, error_body
from minserve.server.json_array import dump_pieces
from minserve.server.logprobs import LogprobWriter
from minserve.server.prompt_choices import Choice, ChoicePart, PromptChoices
from minserve.server.protocol import GenerationCall
from minserve.server.reply_base import TOOL_CALLS, ReplyBase
from minserve.server.slo_http import slo_object
from minserve.server.sse import StreamEvent

if TYPE_CHECKING:
    from minserve.engine.text.tokenizer import Tokenizer


class Reply(ReplyBase):
    """Builds the answer to one request.

    Its methods are those of `minserve.server.generation.ReplyFace`.

    Args:
        call: the parsed body.
        handles: the engine's handles, one per prompt.
        model: the model's name in the API.
        tokenizer: for the texts of tokens and of echoed prompts.
    """

    names_events = False

    def __init__(
        self,
        call: GenerationCall,
        handles: Sequence[Handle],
        model: str,
        tokenizer: Tokenizer,
    ) -> None:
        writer = LogprobWriter(tokenizer)
        kind = "chat.completion" if call.chat else "text_completion"
        prefix = "chatcmpl" if call.chat else "cmpl"
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        groups = [PromptChoices(handle, call, tokenizer, writer) for handle in handles]
        super().__init__(call, str(self._head["id"]), model, groups)
        self._tokenizer = tokenizer
        self.has_large_events = call.params.prompt_logprobs is not None
        # A delta brings a chunk nothing but its text, once the chunk is not the first.
        self._is_plain = (
            call.form is None
            and call.params.logprobs is None
            and not (call.return_token_ids or call.continuous_usage or call.drop_output)
        )
        self._chunk_head = dict(self._head)
        if call.chat:
            self._chunk_head["object"] = "chat.completion.chunk"

    def chunks(self, prompt: int, delta: OutputDelta) -> Sequence[StreamEvent]:
        """Return the stream chunks that can be sent after a delta of the given prompt; often 0 or
        1.
        """
        group = self._groups[prompt]
        if delta.finish_reason is None:
            frame = group.choices[delta.index].frame
            if frame is not None:
                return [frame.around(delta.text)] if delta.text else []
        group.held.append(delta)
        if group.awaits_prompt_logprobs:
            return []
        deltas, group.held = group.held, []
        return [chunk for one in deltas if (chunk := self._chunk(prompt, one)) is not None]

    def last_chunks(self) -> list[dict[str, Any]]:
        """Return the chunk without choices that ends a stream with ``include_usage``."""
        if not self._call.include_usage:
            return []
        return [{**self._chunk_head, "choices": [], "usage": self._final_usage()}]

    def failure(self, error: HttpError) -> list[dict[str, Any]]:
        """Return the event that ends a stream which has failed."""
        return [error_body(error)]

    def add(self, prompt: int, delta: OutputDelta) -> None:
        """Write a delta of the given prompt for `body`."""
        group = self._groups[prompt]
        choice = group.choices[delta.index]
        if choice.is_done:
            return
        if choice.part is None:
            choice.part = ChoicePart(self._call)
        group.write(choice.part, delta)
        choice.end = delta

    def body(self) -> Iterator[bytes]:
        """Yield the whole response's JSON in pieces."""
        choices = [
            self._whole(prompt, choice, choice.part, choice.end)
            for prompt, group in enumerate(self._groups)
            for choice in group.choices
            if choice.part is not None and choice.end is not None
        ]
        of_prompt = self._groups[0].facts() if self._call.chat else {}
        return dump_pieces(
            {**self._head, "choices": choices, "usage": self._final_usage(), **of_prompt}
        )

    def _chunk(self, prompt: int, delta: OutputDelta) -> dict[str, Any] | None:
        """Return a chunk with one choice; ``None`` where the delta has nothing to report."""
        group = self._groups[prompt]
        state, part = group.choices[delta.index], ChoicePart(self._call)
        if state.is_done:
            return None
        group.write(part, delta, echo=not state.begun)
        if not part and delta.finish_reason is None and not state.is_done:
            return None
        choice = self._choice(prompt, state, part, delta)
        chunk = {**self._chunk_head, "choices": [choice]}
        if self._call.chat and not group.begun:
            chunk |= group.facts()
        state.begun = group.begun = True
        if self._call.continuous_usage:
            chunk["usage"] = self.usage()
        if self._is_plain and delta.finish_reason is None and state.frame is None:
            state.frame = self._frame(prompt, state, delta)
        return chunk

    def _frame(self, prompt: int, state: Choice, delta: OutputDelta) -> ChunkFrame:
        """Return what the next chunks of a choice have in common: all but their texts."""
        part = ChoicePart(self._call)
        part.add_text(PLACEHOLDER)
        choice = self._choice(prompt, state, part, delta)
        return ChunkFrame({**self._chunk_head, "choices": [choice]})

    def _choice(
        self, prompt: int, state: Choice, part: ChoicePart, delta: OutputDelta
    ) -> dict[str, Any]:
        """Return one choice of a chunk."""
        choice: dict[str, Any] = {"index": prompt * self._call.params.n + delta.index}
        if part.pieces is not None:
            choice["delta"] = part.pieces.delta(is_first=not state.begun)
        elif self._call.chat:
            # The role is sent with the first chunk that has content.
            choice["delta"] = {} if state.begun else {"role": "assistant", "content": part.text}
            if part:
                choice["delta"]["content"] = part.text
        else:
            choice["text"] = part.text
            if not state.begun:
                choice |= self._groups[prompt].facts()
        return {**choice, **part.facts(), **self._finish(state, delta)}

    def _whole(
        self, prompt: int, state: Choice, part: ChoicePart, delta: OutputDelta
    ) -> dict[str, Any]:
        """Return one choice of a whole response, which ended with the given delta."""
        choice: dict[str, Any] = {"index": prompt * self._call.params.n + delta.index}
        if part.pieces is not None:
            choice["message"] = part.pieces.message()
        elif self._call.chat:
            choice["message"] = {"role": "assistant", "content": part.text, "refusal": None}
        else:
            group = self._groups[prompt]
            part = group.with_echo(part)
            choice |= {"text": part.text, **group.facts()}
        return {**choice, **part.facts(), **self._finish(state, delta)}

    def _finish(self, state: Choice, delta: OutputDelta) -> dict[str, Any]:
        reason = delta.finish_reason
        if state.is_done:
            self._ends_in_calls(None)
            return {"finish_reason": TOOL_CALLS, "stop_reason": None}
        if reason is None:
            return {"finish_reason": None}
        if reason is FinishReason.STOP and state.parser is not None and state.parser.num_calls:
            self._ends_in_calls(reason)
            return {"finish_reason": TOOL_CALLS, "stop_reason": delta.stop_reason}
        stop_reason = None if self._call.drop_output else delta.stop_reason
        return {"finish_reason": self._finish_reason(reason), "stop_reason": stop_reason}

    def _final_usage(self) -> dict[str, Any]:
        """Return the usage at the end of the answer.

        It includes the acceptance of drafted tokens, where the client asked for it, and the
        report of the output that did worst on its SLO, where the request has one.
        """
        usage = self.usage()
        if self._call.include_acceptance:
            usage["acceptance"] = self._acceptance()
        if (report := self.slo_report()) is not None:
            usage["slo"] = slo_object(report)
        return usage

    def _acceptance(self) -> dict[str, Any]:
        choices = [choice for group in self._groups for choice in group.choices]
        return acceptance(
            sum(choice.num_draft_tokens for choice in choices),
            sum(choice.num_accepted_tokens for choice in choices),
        )
