"""Get data out of texts as JSON that always fits a schema, from a running server (`make serve`).

It needs the official client: `.venv/bin/pip install openai`.

.venv/bin/python examples/extraction.py
"""

from typing import Literal

from openai import OpenAI
from pydantic import BaseModel, Field

TEXTS = (
    "The kettle stopped working after two days. I want my money back!",
    "Five stars. My daughter loves the bicycle, it is so quick.",
)


class Review(BaseModel):
    """What a review says."""

    product: str = Field(max_length=40)
    mood: Literal["happy", "angry", "neutral"]
    wants_refund: bool


def extract(client: OpenAI, text: str) -> Review:
    """Read a review; `max_tokens` is large enough for the longest JSON that fits the schema."""
    answer = client.chat.completions.parse(
        model="smollm2",
        messages=[{"role": "user", "content": f"What does this review say? {text}"}],
        response_format=Review,
        max_tokens=256,
        temperature=0,
    )
    review = answer.choices[0].message.parsed
    assert review is not None
    return review


if __name__ == "__main__":
    server = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    for one in TEXTS:
        print(extract(server, one).model_dump_json())
