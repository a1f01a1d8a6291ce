"""The building blocks of a report's page: tables, sections and the frame, with everything escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 0.5rem 0 1rem; }
th, td { border: 1px solid #ccc; padding: 0.25rem 0.6rem; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
th { background: #f3f3f3; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.4 ui-monospace, monospace; background: #f7f7f7; }
svg, img { margin: 0 0.6rem 0.8rem 0; border: 1px solid #eee; } img { image-rendering: pixelated; }
.note { color: #666; } .bad { color: #b00; font-weight: 600; } .good { color: #170; font-weight: 600; }
figure { display: inline-block; margin: 0 1rem 0.8rem 0; } figcaption { font-size: 12px; color: #555; }
.bar { display: flex; height: 1.4rem; border: 1px solid #ccc; margin: 0.4rem 0; } .bar span { display: block; }
"""


def text(value: Any) -> str:
    """Return a value as escaped text; None is empty."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return html.escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a table whose header has the keys of all of them; nothing without rows."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{text(column.replace('_', ' '))}</th>" for column in columns)
    lines = [f"<tr>{''.join(_cell(row.get(column)) for column in columns)}</tr>" for row in rows]
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def pairs(values: Mapping[str, Any]) -> str:
    """Return a table with a row for each value that is known."""
    known = {key: value for key, value in values.items() if value is not None}
    return f"<table>{''.join(f'<tr><th>{text(key)}</th>{_cell(value)}</tr>' for key, value in known.items())}</table>"


def _cell(value: Any) -> str:
    style = ' class="number"' if isinstance(value, int | float) and not isinstance(value, bool) else ""
    return f"<td{style}>{text(value)}</td>"


def section(title: str, *parts: str, otherwise: str = "") -> str:
    """Return a section; if all of its parts are empty, it says `otherwise`."""
    content = "\n".join(part for part in parts if part) or f'<p class="note">{text(otherwise)}</p>'
    return f"<h2>{text(title)}</h2>\n{content}"


def folded(title: str, content: str, is_open: bool = False) -> str:
    """Return content that is shown after a click, without any script."""
    return f"<details{' open' if is_open else ''}><summary>{text(title)}</summary>{content}</details>"


def page(title: str, parts: Sequence[str]) -> str:
    """Return a page that loads nothing and runs no code, which a policy in its head enforces."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{STYLE}</style></head><body>'
    )
    return "\n".join([head, *parts, "</body></html>\n"])
