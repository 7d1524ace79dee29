"""The stages of SLOs end with the marker that answers' thinking ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tool_templates import BY_NAME

from minserve.config import EngineConfig
from minserve.engine.promises import Promises
from minserve.engine.text.backend import RustBackend
from minserve.engine.text.tokenizer import Tokenizer
from minserve.server.chat_facts import find_chat_facts


@pytest.mark.parametrize(
    ("template", "special", "settings", "marker"),
    [
        ("hermes", [], {}, None),
        ("hybrid", [], {}, "</think>"),
        ("hermes", ["</think>"], {}, "</think>"),
        ("hermes", ["[/THINK]"], {}, "[/THINK]"),
        ("hermes", [], {"reasoning_format": "mistral"}, "[/THINK]"),
        # The model thinks all the same where answers do not tell it apart.
        ("hybrid", [], {"reasoning_format": "none"}, "</think>"),
        ("hybrid", [], {"thinking_marker": "Answer:"}, "Answer:"),
    ],
)
def test_the_marker_is_that_of_the_format(
    template: str,
    special: list[str],
    settings: dict[str, Any],
    marker: str | None,
    tiny_llama_dir: Path,
) -> None:
    rust = RustTokenizer.from_file(str(tiny_llama_dir / "tokenizer.json"))
    rust.add_special_tokens(special)
    tokenizer = Tokenizer(RustBackend(rust), chat_template=BY_NAME[template])
    config = EngineConfig(**settings)
    assert Promises(config, tokenizer).thinking_marker == marker
    thinking = find_chat_facts(tokenizer, config).thinking
    if "thinking_marker" not in settings:
        assert (None if thinking is None else thinking.end) == marker
