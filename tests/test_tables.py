"""Tables of text: aligned columns, dashes for what is missing, and Markdown."""

from __future__ import annotations

from minserve.tables import text_table

ROWS = [("dp", 1, None), ("sarathi 64", 22.5, "7%")]


def test_names_are_aligned_to_the_left_and_numbers_to_the_right() -> None:
    head, first, second = text_table(("policy", "rate", "share"), ROWS).splitlines()
    assert [len(line) for line in (head, first, second)] == [len(second)] * 3
    assert head.split() == ["policy", "rate", "share"]
    assert first.split() == ["dp", "1", "-"]
    assert second.startswith("sarathi 64")
    assert second.endswith("7%")
    assert head.index("policy") == 0


def test_numbers_are_shown_as_they_are() -> None:
    assert text_table(("x",), [("1.50",), ("1e3",), ("007",)], left=0).split() == [
        "x",
        "1.50",
        "1e3",
        "007",
    ]


def test_a_table_without_rows_has_its_headings() -> None:
    assert text_table(("policy", "rate"), []).split() == ["policy", "rate"]


def test_markdown_has_a_line_below_its_headings() -> None:
    head, rule, *rows = text_table(("policy", "rate"), [("dp", 1)], markdown=True).splitlines()
    assert head.startswith("| policy")
    assert set(rule) <= set("|-:")
    assert [cell.strip() for cell in rows[0].split("|")] == ["", "dp", "1", ""]
