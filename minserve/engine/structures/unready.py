"""`Unready`: outputs whose structures are still being compiled, so that they cannot start yet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from minserve.engine.structures.grammar import GrammarError
from minserve.errors import InvalidRequestError
from minserve.request import Sequence

if TYPE_CHECKING:
    from minserve.engine.live_output import Output

# Seconds to wait at once where nothing else is to be done: news may come meanwhile.
PAUSE_S = 0.005


class Unready:
    """Keeps waiting outputs from the planner's eyes until their structures are compiled."""

    def __init__(self) -> None:
        self._outputs: dict[str, Output] = {}

    def __bool__(self) -> bool:
        return bool(self._outputs)

    def add(self, output: Output) -> None:
        """Take an output, if it has a structure."""
        if output.seq.guide is not None:
            self._outputs[output.seq.seq_id] = output

    def release(
        self, alive: Mapping[str, Output]
    ) -> Iterator[tuple[Output, InvalidRequestError | None]]:
        """Let the outputs go that are ready, each with the error that ends it, if any does.

        Args:
            alive: the outputs under way; others are forgotten.
        """
        for seq_id, output in list(self._outputs.items()):
            guide = output.seq.guide
            if alive.get(seq_id) is not output or guide is None:
                del self._outputs[seq_id]
            elif guide.is_ready:
                del self._outputs[seq_id]
                yield output, _start(output)

    def without(self, waiting: list[Sequence]) -> list[Sequence]:
        """Return the sequences that are not among them."""
        if not self._outputs:
            return waiting
        return [seq for seq in waiting if seq.seq_id not in self._outputs]

    def pause(self) -> None:
        """Wait a moment for one of them."""
        for output in self._outputs.values():
            if output.seq.guide is not None:
                output.seq.guide.wait(PAUSE_S)
                return


def _start(output: Output) -> InvalidRequestError | None:
    """Start an output's guide; return the error where there is no grammar for it."""
    seq = output.seq
    structure = seq.request.params.structure
    assert seq.guide is not None
    assert structure is not None
    try:
        seq.guide.start()
    except GrammarError as error:
        return structure.refusal(str(error))
    return None
