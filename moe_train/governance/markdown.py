"""Tables in Markdown, and the mark for what only people know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

TODO = "TODO"
"""Stands wherever no record has the answer."""


def mapping_table(rows: Mapping[str, str]) -> str:
    """Return a table with two columns and no header."""
    lines = ["| | |", "|---|---|"]
    lines += [f"| {name} | {cell(value)} |" for name, value in rows.items()]
    return "\n".join(lines)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table with a header."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    lines += [f"| {' | '.join(cell(value) for value in row)} |" for row in rows]
    return "\n".join(lines)


def cell(text: str) -> str:
    """Return a text as one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
