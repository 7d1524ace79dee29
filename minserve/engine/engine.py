"""`Engine`: it blocks, and runs its core in the thread of its caller."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any, cast

from minserve.config import DEFAULT_MODEL
from minserve.engine.base import EngineBase, Submission
from minserve.errors import InvalidRequestError
from minserve.outputs import CompletionOutput, OutputDelta, RequestOutput
from minserve.progress_bar import progress_bar
from minserve.prompts import Prompt
from minserve.sampling_params import SamplingParams
from minserve.slo.objectives import SLO


class Engine(EngineBase):
    """A blocking engine for scripts and notebooks. Not thread-safe.

    Example:
        >>> engine = Engine("smollm2")
        >>> engine.generate("Hello", SamplingParams(max_tokens=8))[0].outputs[0].text
    """

    def __init__(self, model: str = DEFAULT_MODEL, **settings: Any) -> None:
        super().__init__(model, **settings)
        self._mailboxes: dict[str, deque[OutputDelta]] = {}

    def generate(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        *,
        slo: SLO | str | None = None,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Run requests together and wait for all of them.

        Args:
            prompts: one prompt or a list of them; a prompt is a text, a list of token
                ids, or a list of chat messages (``{"role": ..., "content": ...}``).
            params: the sampling settings of all prompts, or one for each; without any, those of
                `default_sampling_params`.
            slo: the latency asked for, as an `SLO` or a class's name; default: the engine's.
            progress: show a progress bar of finished outputs.

        Returns:
            One output per prompt, in order.

        Raises:
            InvalidRequestError: before anything runs, if a prompt cannot be served.
            InvalidSLOError: for an unknown class.
            SLOUnattainableError: if the SLO asks to be refused rather than be late.
            GenerationError: if running one of them failed.
        """
        self._ready_for(slo)
        many = _as_list(prompts)
        every = (
            [params or self.default_sampling_params] * len(many)
            if not isinstance(params, (list, tuple))
            else params
        )
        if len(every) != len(many):
            raise InvalidRequestError(
                f"{len(many)} prompts but {len(every)} sampling params", "params"
            )
        submissions = self._join(
            [self._prepare(prompt, one, slo=slo) for prompt, one in zip(many, every, strict=True)]
        )
        outputs = [_empty_output(submission) for submission in submissions]
        total = sum(len(s.sequences) for s in submissions)
        with progress_bar(total=total, desc="Generating", unit="seq", disable=not progress) as bar:
            for output, delta in self._drain(submissions):
                outputs[output].add(delta)
                bar.update(delta.finish_reason is not None)
        return outputs

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        slo: SLO | str | None = None,
    ) -> Iterator[OutputDelta]:
        """Run one request and yield its news as it comes. Closing the iterator aborts it.

        Several streams may be read in turns; each step advances all of them.

        Raises:
            InvalidRequestError: at once, if the prompt cannot be served.
            GenerationError: while iterating, if running it failed.
        """
        self._ready_for(slo)
        submission = self._prepare(prompt, params or self.default_sampling_params, slo=slo)
        return (delta for _, delta in self._drain(self._join([submission])))

    def _drain(self, submissions: list[Submission]) -> Iterator[tuple[int, OutputDelta]]:
        """Run requests to their end; yield which one and its delta, in order of events."""
        mine = {s.request.request_id: i for i, s in enumerate(submissions)}
        unfinished = sum(len(s.sequences) for s in submissions)
        mailbox: deque[OutputDelta] = deque()
        watches = [self._intake.tasks.watch(one.request) for one in submissions]
        for submission in submissions:
            self._mailboxes[submission.request.request_id] = mailbox
            self._enqueue(submission)
        try:
            while unfinished:
                while not mailbox:
                    self._step()
                delta = mailbox.popleft()
                watches[mine[delta.request_id]].note(delta)
                delta.raise_if_failed()
                unfinished -= delta.finish_reason is not None
                yield mine[delta.request_id], delta
        finally:
            for watch in watches:
                watch.leave()
            for request_id in mine:
                self._core.abort(request_id)
                del self._mailboxes[request_id]
            self._core.drain()

    def _step(self) -> None:
        """Run one iteration and put its deltas into the mailboxes of their readers."""
        try:
            deltas = self._core.step()
        except Exception:
            self._post(self._core.take_untold())
            raise
        self._post(deltas)

    def _post(self, deltas: list[OutputDelta]) -> None:
        for delta in deltas:
            self._mailboxes[delta.request_id].append(delta)


def _as_list(prompts: Prompt | SequenceOf[Prompt]) -> list[Prompt]:
    """Return a list of prompts, also for a single prompt (text, token ids, messages)."""
    if isinstance(prompts, str):
        return [prompts]
    items = list(prompts)
    # The first item tells a prompt of ids or messages from a list of prompts.
    if items and isinstance(items[0], (int, Mapping)):
        return [cast("Prompt", items)]
    return cast("list[Prompt]", items)


def _empty_output(submission: Submission) -> RequestOutput:
    request = submission.request
    return RequestOutput(
        request_id=request.request_id,
        prompt=submission.text,
        prompt_token_ids=list(request.prompt_token_ids),
        outputs=[CompletionOutput(index=i) for i in range(request.params.n)],
    )
