"""Text of records stays in its cell of a table."""

from __future__ import annotations

from moe_train.governance.markdown import cell, mapping_table, table


def test_text_with_bars_and_line_ends_stays_in_its_cell():
    assert cell("a |\n  b") == "a \\| b"
    assert mapping_table({"licence": "a | b"}).splitlines()[-1] == "| licence | a \\| b |"
    assert table(("x", "y"), [("1\n2", "|")]).splitlines() == ["| x | y |", "|---|---|", "| 1 2 | \\| |"]
