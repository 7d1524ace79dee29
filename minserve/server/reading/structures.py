"""What is done with the structure that a body asks for: it is checked."""

from __future__ import annotations

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
        is_busy: true in a process that has other things to do, where nothing is checked.
    """

    def __init__(self, prompts: PromptProcessor, is_busy: bool) -> None:
        self._prompts, self._is_busy = prompts, is_busy
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
