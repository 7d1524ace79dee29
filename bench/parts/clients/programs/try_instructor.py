"""instructor: structured output by prompts, by JSON mode, and by tools."""

from __future__ import annotations

import os

import instructor
import openai
from client_checks import check
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


for mode in (instructor.Mode.MD_JSON, instructor.Mode.JSON):
    try:
        check(f"{mode.name} is answered", True, ask(mode))
    except (InstructorRetryException, ValidationError, IncompleteOutputException) as error:
        # The server has answered; whether so small a model gives the right fields is another matter.
        refused = isinstance(error.__cause__, openai.APIError)
        words = " ".join(str(error).split())[:200]
        check(f"{mode.name} is answered, if not with the right fields", not refused, words)

check("TOOLS, a tool that must be called", isinstance(ask(instructor.Mode.TOOLS), Colour))
