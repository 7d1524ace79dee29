"""`PromptChoices`: the choices of one prompt, and what an answer tells of the prompt itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minserve.outputs import OutputDelta, TokenLogprob
from minserve.server.answer.answer_parser import AnswerParser
from minserve.server.answer.parts import Content, Part
from minserve.server.answer.thinking_tokens import ThinkingTokens
from minserve.server.chat_message import MessagePieces
from minserve.server.chunk_frame import ChunkFrame
from minserve.server.engine_face import Handle
from minserve.server.json_array import JsonArray
from minserve.server.logprobs import ChatLogprobs, CompletionLogprobs, LogprobWriter
from minserve.server.pauses import UNITS_PER_DELTA, Pauses
from minserve.server.protocol import GenerationCall
from minserve.slo.attainment import SLOReport

if TYPE_CHECKING:
    from minserve.engine.text.text_offsets import TextOffsets
    from minserve.engine.text.tokenizer import Tokenizer


class ChoicePart:
    """What a chunk, or a whole answer, tells of one choice."""

    __slots__ = ("_call", "_texts", "logprobs", "pieces", "token_ids")

    def __init__(self, call: GenerationCall) -> None:
        self._call = call
        self._texts: list[str] = []
        self.pieces = (
            None if call.form is None else MessagePieces(includes_thinking=call.form.includes)
        )
        self.token_ids = JsonArray()
        self.logprobs: ChatLogprobs | CompletionLogprobs = (
            ChatLogprobs() if call.chat else CompletionLogprobs()
        )

    def __bool__(self) -> bool:
        """True where there is something new for the client."""
        return bool(
            any(self._texts)
            or self.pieces
            or self.logprobs
            or (self._call.return_token_ids and self.token_ids)
        )

    def add_text(self, text: str) -> None:
        self._texts.append(text)

    def echo(self, text: str, logprobs: CompletionLogprobs) -> None:
        """Append the prompt's text and log probabilities."""
        self._texts.append(text)
        if isinstance(self.logprobs, CompletionLogprobs):
            self.logprobs.join(logprobs)

    def join(self, other: ChoicePart) -> None:
        """Append another part of a completion."""
        self._texts += other._texts
        self.token_ids.join(other.token_ids)
        if isinstance(self.logprobs, CompletionLogprobs) and isinstance(
            other.logprobs, CompletionLogprobs
        ):
            self.logprobs.join(other.logprobs)

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def facts(self) -> dict[str, Any]:
        """Return the fields of a choice besides its text and its end."""
        facts: dict[str, Any] = {"logprobs": self.logprobs.value() if self.logprobs else None}
        if self._call.return_token_ids:
            facts["token_ids"] = self.token_ids
        return facts


@dataclass(slots=True)
class Choice:
    """The state of one choice between two deltas.

    Attributes:
        begun: a chunk of it was made.
        offsets: finds where its tokens begin in the text, where that is wanted.
        part: all that a whole answer tells of it so far.
        end: its newest delta.
        parser: tells the parts of its text apart, where that is wanted.
        thinking: counts the tokens of its thinking, where the model thinks.
        frame: writes its next chunks, where these bring nothing but text.
        has_ended: its output has ended.
        is_done: it has ended before its output did, and nothing more of that is told.
    """

    begun: bool = False
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    offsets: TextOffsets | None = None
    part: ChoicePart | None = None
    end: OutputDelta | None = None
    parser: AnswerParser | None = None
    thinking: ThinkingTokens | None = None
    frame: ChunkFrame | None = None
    has_ended: bool = False
    is_done: bool = False


class PromptChoices:
    """The choices of one prompt.

    Prompt log probabilities come with the first delta of output 0 only, and every choice
    begins with them. Deltas of other outputs that come earlier wait in ``held``.
    """

    def __init__(
        self, handle: Handle, call: GenerationCall, tokenizer: Tokenizer, writer: LogprobWriter
    ) -> None:
        self.handle = handle
        self.choices = [_new_choice(call, tokenizer) for _ in range(call.params.n)]
        self.begun = False
        self.num_output_tokens = 0
        self.num_cached_tokens = 0
        self.awaits_prompt_logprobs = call.params.prompt_logprobs is not None
        self.held: list[OutputDelta] = []
        self.slo_reports: list[SLOReport] = []
        self._call, self._tokenizer, self._writer = call, tokenizer, writer
        self._text: str | None = None
        self._echoed = CompletionLogprobs()
        self._prompt_logprobs = JsonArray()

    async def note(self, delta: OutputDelta, pauses: Pauses) -> None:
        """Count a delta's tokens, and write what it tells of the prompt."""
        call = self._call
        if delta.slo is not None:
            self.slo_reports.append(delta.slo)
        if delta.finish_reason is not None:
            self.choices[delta.index].has_ended = True
            self._leave_if_told()
        if self.choices[delta.index].is_done:
            return
        if not call.drop_output:
            self.num_output_tokens += len(delta.token_ids)
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        choice = self.choices[delta.index]
        choice.num_draft_tokens = delta.num_draft_tokens
        choice.num_accepted_tokens = delta.num_accepted_tokens
        if choice.thinking is not None and not choice.thinking.is_over:
            # A token that ends the output is no thinking.
            has_stop = isinstance(delta.stop_reason, int)
            choice.thinking.add(delta.token_ids[:-1] if has_stop else delta.token_ids)
        if delta.prompt_logprobs is not None:
            await self._write_prompt(delta.prompt_logprobs, pauses)
            self.awaits_prompt_logprobs = False
        width = 1 + (call.params.logprobs or 0)
        await pauses.after(UNITS_PER_DELTA + width * len(delta.logprobs or ()))

    def write(self, part: ChoicePart, delta: OutputDelta, *, echo: bool = False) -> None:
        """Write a delta into a part.

        Args:
            echo: the part is the first of its choice, so that it begins with the prompt where the
                client wants that.
        """
        call = self._call
        if echo and call.echo:
            part.echo(self._echo_text(), self._echoed)
        if call.drop_output:
            return
        if part.pieces is None:
            part.add_text(delta.text)
        else:
            part.pieces.add(self.parse(delta))
        if call.return_token_ids:
            part.token_ids.extend(delta.token_ids)
        if not delta.logprobs:
            return
        if isinstance(part.logprobs, ChatLogprobs):
            self._writer.chat(part.logprobs, delta.logprobs)
            return
        offsets = self._offsets(self.choices[delta.index]).take(delta.token_ids)
        num_top = call.params.logprobs or 0
        self._writer.completion(part.logprobs, delta.token_ids, delta.logprobs, offsets, num_top)

    def parse(self, delta: OutputDelta) -> list[Part]:
        """Return the parts of a delta's text, and end an output that has all it may have."""
        choice = self.choices[delta.index]
        if choice.parser is None:
            return [Content(delta.text)] if delta.text else []
        parts = choice.parser.feed(delta.text)
        if delta.finish_reason is not None:
            return parts + choice.parser.end()
        if choice.parser.is_done:
            choice.is_done = True
            self._leave_if_told()
        return parts

    def _leave_if_told(self) -> None:
        """End the outputs that go on, where all of them was told."""
        going = [one for one in self.choices if not one.has_ended]
        if going and all(one.is_done for one in going):
            self.handle.complete()

    @property
    def num_thinking_tokens(self) -> int:
        """The tokens of all choices' thinking so far."""
        return sum(one.thinking.count for one in self.choices if one.thinking is not None)

    def with_echo(self, part: ChoicePart) -> ChoicePart:
        """Return the part of a whole answer with the prompt before it, where that is wanted."""
        if not self._call.echo:
            return part
        whole = ChoicePart(self._call)
        whole.echo(self._echo_text(), self._echoed)
        whole.join(part)
        return whole

    def facts(self) -> dict[str, Any]:
        """Return what an answer tells of the prompt, as vLLM's do, where it is wanted."""
        facts: dict[str, Any] = {}
        if self._call.prompt_logprobs is not None:
            facts["prompt_logprobs"] = self._prompt_logprobs
        if self._call.return_token_ids:
            facts["prompt_token_ids"] = self.handle.prompt_token_ids
        return facts

    async def _write_prompt(self, entries: Sequence[TokenLogprob | None], pauses: Pauses) -> None:
        """Write the log probabilities of the prompt, a piece at a time.

        The prompt may have thousands of tokens, each with a hundred alternatives.
        """
        call, ids = self._call, self.handle.prompt_token_ids
        echoed = call.params.logprobs if call.echo else None
        offsets = self._tokenizer.prompt_offsets(self.handle.prompt, ids)
        units = 10 + (echoed or 0) + (call.prompt_logprobs or 0)
        step = 1 + 250 // units
        for start in range(0, len(ids), step):
            part = slice(start, start + step)
            if call.prompt_logprobs is not None:
                self._writer.prompt(self._prompt_logprobs, entries[part], call.prompt_logprobs)
            if echoed is not None:
                self._writer.completion(
                    self._echoed, ids[part], entries[part], offsets.take(ids[part]), echoed
                )
            await pauses.after(units * len(ids[part]))

    def _offsets(self, choice: Choice) -> TextOffsets:
        if choice.offsets is None:
            choice.offsets = self._tokenizer.output_offsets(
                self.handle.prompt_token_ids,
                len(self._echo_text()) if self._call.echo else 0,
                self._call.params.skip_special_tokens,
                self._call.params.preserved_tokens,
            )
        return choice.offsets

    def _echo_text(self) -> str:
        """Return the prompt's text as it is echoed: as it was given, where it was given as text."""
        if self._text is None:
            self._text = self.handle.prompt
        if self._text is None:
            ids = self.handle.prompt_token_ids
            self._text = self._tokenizer.decode(ids, skip_special_tokens=False)
        return self._text


def _new_choice(call: GenerationCall, tokenizer: Tokenizer) -> Choice:
    choice, form = Choice(), call.form
    if form is not None:
        choice.parser = form.parser()
        if form.reasoning is not None:
            choice.thinking = ThinkingTokens(
                form.reasoning, tokenizer.token_bytes, is_open=form.is_open
            )
    return choice
