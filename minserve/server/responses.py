"""OpenAI's response bodies and stream chunks, built from the engine's deltas.

`Reply` belongs to one HTTP request: up to several prompts, each with ``n`` choices.
Choice ``prompt * n + output`` of the response is output ``output`` of prompt ``prompt``.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minserve.outputs import OutputDelta, TokenLogprob, acceptance
from minserve.server.engine_face import Handle
from minserve.server.logprobs import LogprobWriter, join_arrays
from minserve.server.protocol import GenerationCall
from minserve.server.slo_http import slo_object
from minserve.slo.attainment import SLOReport, worst_report

if TYPE_CHECKING:
    from minserve.engine.text.tokenizer import Tokenizer


@dataclass(slots=True)
class _Choice:
    """The state of one choice between two deltas."""

    begun: bool = False
    text_offset: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


class _PromptChoices:
    """The choices of one prompt.

    Prompt log probabilities come with the first delta of output 0 only, and every choice
    begins with them. Deltas of other outputs that come earlier wait in ``held``.
    """

    def __init__(self, handle: Handle, call: GenerationCall) -> None:
        self.handle = handle
        self.choices = [_Choice() for _ in range(call.params.n)]
        self.num_output_tokens = 0
        self.num_cached_tokens = 0
        self.prompt_logprobs: Sequence[TokenLogprob | None] | None = None
        self.awaits_prompt_logprobs = call.params.prompt_logprobs is not None
        self.held: list[OutputDelta] = []
        self.slo_reports: list[SLOReport] = []

    def note(self, delta: OutputDelta, counts_output: bool) -> None:
        """Count a delta's tokens and keep what it reports of the prompt."""
        if counts_output:
            self.num_output_tokens += len(delta.token_ids)
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
            self.awaits_prompt_logprobs = False
        choice = self.choices[delta.index]
        choice.num_draft_tokens = delta.num_draft_tokens
        choice.num_accepted_tokens = delta.num_accepted_tokens
        if delta.slo is not None:
            self.slo_reports.append(delta.slo)


class Reply:
    """Builds the answer to one request.

    Args:
        call: the parsed body.
        handles: the engine's handles, one per prompt.
        model: the model's name in the API.
        tokenizer: for the texts of tokens and of echoed prompts.
    """

    def __init__(
        self,
        call: GenerationCall,
        handles: Sequence[Handle],
        model: str,
        tokenizer: Tokenizer,
    ) -> None:
        self._call = call
        self._groups = [_PromptChoices(handle, call) for handle in handles]
        self._tokenizer = tokenizer
        self._logprobs = LogprobWriter(tokenizer)
        kind = "chat.completion" if call.chat else "text_completion"
        prefix = "chatcmpl" if call.chat else "cmpl"
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        self._chunk_head = dict(self._head)
        if call.chat:
            self._chunk_head["object"] = "chat.completion.chunk"

    def chunks(self, prompt: int, delta: OutputDelta) -> list[dict[str, Any]]:
        """Return the stream chunks that can be sent after a delta of the given prompt; often 0 or
        1.
        """
        group = self._groups[prompt]
        group.note(delta, not self._call.drop_output)
        group.held.append(delta)
        if group.awaits_prompt_logprobs:
            return []
        deltas, group.held = group.held, []
        return [chunk for one in deltas if (chunk := self._chunk(prompt, one)) is not None]

    def usage_chunk(self) -> dict[str, Any]:
        """Return the chunk without choices that ends a stream with ``include_usage``."""
        return {**self._chunk_head, "choices": [], "usage": self._final_usage()}

    def body(self, deltas: Sequence[tuple[int, OutputDelta]]) -> dict[str, Any]:
        """Return the whole response, from every ``(prompt, delta)`` in order of arrival."""
        n = self._call.params.n
        merged: list[list[OutputDelta]] = [[] for _ in range(n * len(self._groups))]
        for prompt, delta in deltas:
            self._groups[prompt].note(delta, not self._call.drop_output)
            merged[prompt * n + delta.index].append(delta)
        choices = [self._whole_choice(i // n, _merge(own)) for i, own in enumerate(merged) if own]
        return {**self._head, "choices": choices, "usage": self._final_usage()}

    def _chunk(self, prompt: int, delta: OutputDelta) -> dict[str, Any] | None:
        choice = self._choice(prompt, delta)
        if choice is None:
            return None
        chunk = {**self._chunk_head, "choices": [choice]}
        if self._call.continuous_usage:
            chunk["usage"] = self._usage()
        return chunk

    def _choice(self, prompt: int, delta: OutputDelta) -> dict[str, Any] | None:
        """Return one choice of a chunk; ``None`` where the delta has nothing to report."""
        state = self._groups[prompt].choices[delta.index]
        text, logprobs = self._text_and_logprobs(prompt, delta)
        if not text and not logprobs and delta.finish_reason is None:
            return None
        choice: dict[str, Any] = {"index": prompt * self._call.params.n + delta.index}
        if self._call.chat:
            # The role is sent with the first chunk that has content.
            choice["delta"] = {} if state.begun else {"role": "assistant", "content": text}
            if text or logprobs:
                choice["delta"]["content"] = text
        else:
            choice["text"] = text
        state.begun = True
        return {**choice, "logprobs": logprobs, **self._finish(delta)}

    def _whole_choice(self, prompt: int, delta: OutputDelta) -> dict[str, Any]:
        text, logprobs = self._text_and_logprobs(prompt, delta)
        choice: dict[str, Any] = {"index": prompt * self._call.params.n + delta.index}
        if self._call.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return {**choice, "logprobs": logprobs, **self._finish(delta)}

    def _finish(self, delta: OutputDelta) -> dict[str, Any]:
        reason = delta.finish_reason
        if reason is None:
            return {"finish_reason": None}
        if self._call.drop_output:
            return {"finish_reason": "length", "stop_reason": None}
        return {"finish_reason": reason.value, "stop_reason": delta.stop_reason}

    def _text_and_logprobs(
        self, prompt: int, delta: OutputDelta
    ) -> tuple[str, dict[str, list[Any]] | None]:
        """Return a delta's text and log probabilities; the echoed prompt precedes the first."""
        group = self._groups[prompt]
        state = group.choices[delta.index]
        if self._call.chat:
            return delta.text, self._logprobs.chat(delta.logprobs) if delta.logprobs else None
        text, arrays = "", None
        if self._call.echo and not state.begun:
            text = self._prompt_text(group)
            if group.prompt_logprobs is not None:
                arrays, state.text_offset = self._logprobs.completion(
                    group.handle.prompt_token_ids, group.prompt_logprobs
                )
        if self._call.drop_output:
            return text, arrays
        if delta.logprobs:
            own, state.text_offset = self._logprobs.completion(
                delta.token_ids, delta.logprobs, state.text_offset
            )
            arrays = own if arrays is None else join_arrays(arrays, own)
        return text + delta.text, arrays

    def _prompt_text(self, group: _PromptChoices) -> str:
        if group.handle.prompt is not None:
            return group.handle.prompt
        return self._tokenizer.decode(group.handle.prompt_token_ids, skip_special_tokens=False)

    def _final_usage(self) -> dict[str, Any]:
        """Return the usage at the end of the answer.

        It includes the acceptance of drafted tokens, where the client asked for it, and the
        report of the output that did worst on its SLO, where the request has one.
        """
        usage = self._usage()
        if self._call.include_acceptance:
            usage["acceptance"] = self._acceptance()
        reports = [report for group in self._groups for report in group.slo_reports]
        if reports:
            usage["slo"] = slo_object(worst_report(reports))
        return usage

    def _acceptance(self) -> dict[str, Any]:
        choices = [choice for group in self._groups for choice in group.choices]
        return acceptance(
            sum(choice.num_draft_tokens for choice in choices),
            sum(choice.num_accepted_tokens for choice in choices),
        )

    def _usage(self) -> dict[str, Any]:
        prompt_tokens = sum(len(group.handle.prompt_token_ids) for group in self._groups)
        completion_tokens = sum(group.num_output_tokens for group in self._groups)
        cached_tokens = sum(group.num_cached_tokens for group in self._groups)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }


def _merge(deltas: Sequence[OutputDelta]) -> OutputDelta:
    """Join the deltas of one output into one delta."""
    last = deltas[-1]
    entries = [entry for delta in deltas for entry in delta.logprobs or ()]
    return OutputDelta(
        request_id=last.request_id,
        index=last.index,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=tuple(entries) or None,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )
