"""instructor: structured output by prompts alone; the other modes need what this server lacks."""

from __future__ import annotations

import os

import instructor
import openai
from client_checks import check, check_raises
from instructor.core import IncompleteOutputException, InstructorRetryException
from pydantic import BaseModel, ValidationError


class Colour(BaseModel):
    name: str


def ask(mode: instructor.Mode) -> Colour:
    client = instructor.from_openai(openai.OpenAI(max_retries=0), mode=mode)
    return client.chat.completions.create(
        model=os.environ["MINSERVE_MODEL"],
        messages=[{"role": "user", "content": "Name a colour."}],
        response_model=Colour,
        max_retries=0,
        temperature=0,
        max_tokens=64,
    )


try:
    check("MD_JSON is answered", True, ask(instructor.Mode.MD_JSON))
except (InstructorRetryException, ValidationError, IncompleteOutputException) as error:
    # The server has answered; whether so small a model writes valid JSON is another matter.
    refused = isinstance(error.__cause__, openai.APIError)
    check(
        "MD_JSON is answered, if not in valid JSON", not refused, " ".join(str(error).split())[:200]
    )

check_raises("TOOLS is refused by name", InstructorRetryException,
             lambda: ask(instructor.Mode.TOOLS), "tool")  # fmt: skip
check_raises("JSON is refused by name", InstructorRetryException,
             lambda: ask(instructor.Mode.JSON), "response_format")  # fmt: skip
