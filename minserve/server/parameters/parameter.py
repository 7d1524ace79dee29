"""`Parameter`: one row of the table, which says what becomes of a field of a request's body."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from minserve.errors import InvalidRequestError
from minserve.server.body import brief, convert, refusal

Endpoint = Literal["completions", "chat", "responses", "tokenize", "detokenize"]

PATHS: Mapping[Endpoint, str] = {
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
    "responses": "/v1/responses",
    "tokenize": "/tokenize",
    "detokenize": "/detokenize",
}
GENERATION: tuple[Endpoint, ...] = ("completions", "chat", "responses")
CHOICES: tuple[Endpoint, ...] = ("completions", "chat")  # their answers have choices
COMPLETIONS: tuple[Endpoint, ...] = ("completions",)
CHAT: tuple[Endpoint, ...] = ("chat",)
RESPONSES: tuple[Endpoint, ...] = ("responses",)
CHATS: tuple[Endpoint, ...] = ("chat", "responses")
MESSAGES: tuple[Endpoint, ...] = ("chat", "tokenize")
TEMPLATES: tuple[Endpoint, ...] = ("chat", "responses", "tokenize")
TOKENIZE: tuple[Endpoint, ...] = ("tokenize",)
DETOKENIZE: tuple[Endpoint, ...] = ("detokenize",)
ALL: tuple[Endpoint, ...] = (*GENERATION, *TOKENIZE, *DETOKENIZE)

# Letters of `Parameter.known_from`.
SERVERS = {
    "O": "OpenAI",
    "V": "vLLM",
    "S": "SGLang",
    "L": "llama.cpp",
    "M": "minserve",
    "X": "others",
}


class Sort(Enum):
    """What becomes of a parameter."""

    WORKS = "works"
    NEUTRAL = "neutral"  # not implemented; values that ask for nothing are accepted
    HINT = "hint"  # changes no result here; accepted, and named in the answer's header
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A parameter of some endpoints.

    Attributes:
        endpoints: those that know it, all in the same way.
        known_from: whose parameter it is too, as letters of `SERVERS`.
        form: the type of what works, and of sane hints; ``Any`` where the endpoint's parser looks
            at the value itself.
        neutral: values that ask for nothing, as if the parameter were not given.
        same_as: another parameter, whose value is neutral here too.
        by_place: true where an error names the place within the value, as ``messages[0].role``.
        required: true where the endpoint cannot do without.
        schema: what a JSON schema of the value says beyond its form, or instead of it for ``Any``.
        says: for readers: the values of what works, why a hint changes nothing, what to use
            instead of what is refused.
        default: for readers: what counts where it is not given.
    """

    name: str
    sort: Sort
    endpoints: tuple[Endpoint, ...] = CHOICES
    known_from: str
    form: Any = Any
    neutral: tuple[Any, ...] = ()
    same_as: str | None = None
    by_place: bool = False
    required: bool = False
    schema: Mapping[str, Any] = field(default_factory=dict)
    says: str = ""
    default: str = ""

    def is_neutral(self, value: Any, body: Mapping[str, Any]) -> bool:
        """True for a value that asks for nothing.

        Args:
            body: all fields of the request.
        """
        if self.same_as is not None and _same(value, body.get(self.same_as)):
            return True
        return any(_same(value, one) for one in self.neutral)

    def read(self, value: Any) -> Any:
        """Return a value in the parameter's form.

        Raises:
            InvalidRequestError: naming the parameter, or the place in it.
        """
        if self.form is Any:
            return value
        try:
            return convert(value, self.form, self.name)
        except InvalidRequestError as error:
            if self.by_place:
                raise
            # The error names an item; clients look for the field.
            raise InvalidRequestError(str(error), self.name) from None

    def refuse(self, value: Any) -> InvalidRequestError:
        """Return the error for a value that cannot be honoured, ready to raise."""
        advice = f"; {self.says}" if self.says else ""
        return refusal(self.name, f"{brief(value)} is not supported{advice}")


def working(name: str, known_from: str, says: str, **more: Any) -> Parameter:
    """Return a parameter that works."""
    return Parameter(name=name, sort=Sort.WORKS, known_from=known_from, says=says, **more)


def _same(value: Any, other: Any) -> bool:
    """Compare JSON values: 1 is 1.0, but true is not 1."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)
