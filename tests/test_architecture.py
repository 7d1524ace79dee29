"""docs/architecture.md names files that exist, and words where the code has them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
TEXT = PAGE.read_text(encoding="utf-8")
LINKS = sorted(set(re.findall(r"\]\((\.\./[^)#]+)\)", TEXT)))
# | word | meaning | [`Name`](file) |
WORDS = re.findall(r"^\| ([^|]+) \| [^|]+ \| \[`(\w+)`\]\(([^)]+)\) \|$", TEXT, re.MULTILINE)
ROWS = [line for line in TEXT.partition("## Words")[2].splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("link", LINKS)
def test_a_link_of_the_page_leads_somewhere(link: str) -> None:
    assert (PAGE.parent / link).exists()


@pytest.mark.parametrize(("word", "name", "link"), WORDS)
def test_a_word_stands_in_the_file_that_the_glossary_names(word: str, name: str, link: str) -> None:
    source = (PAGE.parent / link).read_text(encoding="utf-8")
    assert re.search(rf"^\s*(?:class|def) {name}\b", source, re.MULTILINE), word


def test_every_row_of_the_glossary_names_a_file_and_no_word_stands_twice() -> None:
    heads = [row for row in ROWS if row == "| word | meaning | file |"]
    words = [word for word, _, _ in WORDS]
    assert len(words) == len(set(words)) == len(ROWS) - len(heads) > 0
