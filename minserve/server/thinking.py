"""What a request says of thinking, and what that means for the model's chat template."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

_EFFORT, _ENABLE = "reasoning_effort", "enable_thinking"


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingWish:
    """What a request says of thinking.

    Attributes:
        separate: it is told apart from the content.
        include: it is part of the answer, where it is told apart.
        effort, enable: for the chat template; ``None`` where they are not given.
        effort_name: what the request calls the effort.
    """

    separate: bool = True
    include: bool = True
    effort: str | float | None = None
    enable: bool | None = None
    effort_name: str = _EFFORT

    def for_template(self, variables: Collection[str]) -> tuple[dict[str, Any], list[str]]:
        """Return variables for a chat template, and the names of what it does not know.

        Args:
            variables: the names that the template reads.
        """
        known: dict[str, Any] = {}
        unknown = []
        if self.effort is not None:
            if _EFFORT in variables:
                known[_EFFORT] = self.effort
            elif self.effort == "none" and _ENABLE in variables:
                known[_ENABLE] = False
            else:
                unknown.append(self.effort_name)
        if self.enable is not None:
            if _ENABLE in variables:
                known[_ENABLE] = self.enable
            else:
                unknown.append(_ENABLE)
        return known, unknown
