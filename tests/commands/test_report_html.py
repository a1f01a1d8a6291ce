"""Pieces of a page: everything that comes from a record is escaped."""

from __future__ import annotations

from moe_train.commands.report_html import page, pairs, section, table, text


def test_values_are_escaped_and_formatted() -> None:
    assert text("<a & b>") == "&lt;a &amp; b&gt;" and text({"k": "<"}) == "{&quot;k&quot;: &quot;&lt;&quot;}"
    assert (text(1234567), text(0.123456), text(True), text(None)) == ("1,234,567", "0.1235", "yes", "")
    assert table([{"a<": 1}, {"b": "<x>"}]).count("&lt;") == 2 and table([]) == ""
    assert "<th>known</th>" in pairs({"known": 1, "unknown": None}) and "unknown" not in pairs({"known": 1, "unknown": None})


def test_an_empty_section_says_what_is_missing() -> None:
    assert "nothing &lt;here&gt;" in section("Title", "", otherwise="nothing <here>")
    assert "default-src 'none'" in page("t", [])
