"""What is done with the structure that a body asks for: it is checked, and thinking goes before it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from minserve.structure import Structure

if TYPE_CHECKING:
    from minserve.engine.structures.check import StructureCheck
    from minserve.engine.text.inputs import PromptProcessor


class NotHereError(Exception):
    """The body asks for a structure, and this process has no time to check one."""


class StructureReader:
    """Checks structures for one model.

    Args:
        thinking_marker: the text that ends the model's thinking, if it thinks.
        is_busy: true in a process that has other things to do, where nothing is checked.
    """

    def __init__(
        self, prompts: PromptProcessor, thinking_marker: str | None, is_busy: bool
    ) -> None:
        self._prompts, self._marker, self._is_busy = prompts, thinking_marker, is_busy
        self._check: StructureCheck | None = None

    @property
    def is_stuck(self) -> bool:
        """True once a check was given up, which may go on for ever: the process should end."""
        return self._check is not None and self._check.is_stuck

    def read(self, structure: Structure) -> Structure:
        """Return a structure that can be held, in a form that is cheap to compile.

        Raises:
            InvalidRequestError: where it cannot be held.
            NotHereError: in a busy process.
        """
        if self._is_busy:
            raise NotHereError
        if self._check is None:
            self._check = self._prompts.structure_check()
        return self._check.checked(structure)

    def behind_thinking(self, structure: Structure, prompt: str | None) -> Structure:
        """Return the structure of an answer in a chat, which may think first.

        Args:
            prompt: the chat as its template wrote it.
        """
        if self._marker is None or prompt is None or structure.begins_after is not None:
            return structure
        opener, end = self._marker.replace("/", "", 1), prompt.rstrip()
        if end.endswith(self._marker):  # the template has put an end to it
            return structure
        # Where the template has not begun to think, the model itself may.
        may_open = None if end.endswith(opener) else opener
        return replace(structure, begins_after=self._marker, opener=may_open)
