"""A page that shows answers side by side: one HTML file that loads nothing and runs no code."""

from __future__ import annotations

import difflib
import html
import json
import re
from collections.abc import Mapping, Sequence

from moe_train.machine.files import JsonObject

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; width: 100%; margin: 0.5rem 0 1.5rem; }
th, td { border: 1px solid #ccc; padding: 0.3rem 0.6rem; text-align: left; vertical-align: top; }
th { background: #f3f3f3; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: 13px/1.4 ui-monospace, monospace; }
details { margin: 0.3rem 0; border-left: 4px solid #bbb; padding-left: 0.7rem; }
details.lost { border-color: #c33; } details.gained { border-color: #393; } details.changed { border-color: #c90; }
summary { cursor: pointer; }
ins { background: #dff3df; text-decoration: none; } del { background: #f9dede; text-decoration: none; }
.not-met, .worse { color: #b00; font-weight: 600; } .better { color: #170; font-weight: 600; }
input { display: none; } label { border: 1px solid #999; border-radius: 0.3rem; padding: 0.15rem 0.6rem; margin-right: 0.4rem; }
#changed:checked ~ section details.same, #lost:checked ~ section details:not(.lost) { display: none; }
#all:checked ~ p label[for=all], #changed:checked ~ p label[for=changed], #lost:checked ~ p label[for=lost] { background: #ddd; }
"""


def page(result: JsonObject, rows: Sequence[JsonObject]) -> str:
    """Return the HTML of an evaluation.

    Args:
        result: As `result.result_of` returns it.
        rows: As `result.item_rows` returns them.
    """
    parts = [
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>",
        f"<title>{_text(result['model'])}: suites</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_text(result['model'])}</h1>",
        _table("Weights", result["weights"]),
        _table("Scores", [{key: value for key, value in row.items() if key != "digest"} for row in result["suites"]]),
        _table("Comparisons", result["comparisons"]),
        _table("Requirements", result["requirements"]),
        _items(rows, result),
        "</body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _text(value: object) -> str:
    """Return a value as escaped text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return html.escape(", ".join(f"{key} {_text(entry)}" for key, entry in value.items()))
    return "" if value is None else html.escape(f"{value}")


def _table(title: str, rows: Sequence[JsonObject]) -> str:
    """Return a table with a title; nothing if it has no rows."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{_text(column.replace('_', ' '))}</th>" for column in columns)
    lines = []
    for row in rows:
        style = str(row.get("verdict", "" if row.get("met", True) else "not-met"))
        cells = "".join(f"<td>{_text(row.get(column))}</td>" for column in columns)
        lines.append(f'<tr class="{html.escape(style)}">{cells}</tr>')
    return f"<h2>{title}</h2><table><tr>{head}</tr>{''.join(lines)}</table>"


def _items(rows: Sequence[JsonObject], result: JsonObject) -> str:
    """Return all items, and buttons that hide those that are the same, by style sheet alone."""
    bases = list(dict.fromkeys(row["against"] for row in result["comparisons"]))
    buttons = [("all", "all items"), ("changed", "changed answers"), ("lost", "worse than a base")]
    chosen = "changed" if bases else "all"
    inputs = ""
    labels = ""
    for name, text in buttons:
        inputs += f"<input type=radio name=shown id={name}{' checked' if name == chosen else ''}>"
        labels += f"<label for={name}>{text}</label>"
    details = "\n".join(_item(row, str(result["model"]), bases) for row in rows)
    shown = f"<p>{labels}</p>" if bases else ""
    return f"<h2>Items</h2>{inputs}{shown}<section>{details}</section>"


def _item(row: JsonObject, model: str, bases: Sequence[str]) -> str:
    """Return one item: the question, what is expected, and the answers of all models in columns."""
    answers = row["answers"]
    change = _change(answers, model, bases)
    columns = list(answers)
    head = "".join(f"<th>{_text(name)}: {_score(answers[name])}</th>" for name in columns)
    cells = ""
    for name in columns:
        text = answers[name]["text"]
        shown = _difference(text, answers[model]["text"]) if name in bases else _text(text)
        problem = answers[name].get("problem")
        note = f"<p>not graded: {_text(problem)}</p>" if problem else ""
        cut_off = "" if answers[name]["finished"] else "<p>cut off</p>"
        cells += f"<td><pre>{shown}</pre>{note}{cut_off}</td>"
    title = f"{row['suite']} {row['id']}{' (' + row['category'] + ')' if row['category'] else ''}"
    scores = ", ".join(_score(answers[name]) for name in columns)
    return (
        f'<details class="{change}"><summary>{_text(title)}: {scores} <em>{change}</em></summary>'
        f"<table><tr><th colspan={len(columns)}>{_text(row['where'])}</th></tr>"
        f"<tr><td colspan={len(columns)}><pre>{_question(row)}</pre></td></tr>"
        f"<tr><td colspan={len(columns)}>expected: <pre>{_expected(row['expected'])}</pre></td></tr>"
        f"<tr>{head}</tr><tr>{cells}</tr></table></details>"
    )


def _score(answer: JsonObject) -> str:
    return "not graded" if answer["score"] is None else f"{answer['score']:.3g}"


def _change(answers: JsonObject, model: str, bases: Sequence[str]) -> str:
    """Return whether the model lost or gained against any base, answers otherwise, or the same."""
    new = answers[model]
    states = set()
    for base in bases:
        old = answers[base]
        if new["score"] is not None and old["score"] is not None and new["score"] != old["score"]:
            states.add("gained" if new["score"] > old["score"] else "lost")
        elif new["text"] != old["text"] or new["score"] != old["score"]:
            states.add("changed")
    return next((state for state in ("lost", "gained", "changed") if state in states), "same")


def _question(row: JsonObject) -> str:
    """Return the messages of an item."""
    lines = []
    for message in row["messages"]:
        content = message.get("content")
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        calls = json.dumps(message["tool_calls"], ensure_ascii=False) if message.get("tool_calls") else ""
        lines.append(f"[{message['role']}] {text}{calls}")
    return _text("\n".join(lines))


def _expected(expected: object) -> str:
    if isinstance(expected, list | tuple) and all(isinstance(answer, str) for answer in expected):
        return _text("\n".join(expected))
    return _text(json.dumps(expected, ensure_ascii=False))


def _difference(old: str, new: str) -> str:
    """Return the old text, with what the new one leaves out marked, and what it puts there instead."""
    old_words = re.findall(r"\s+|[^\s]+", old)
    new_words = re.findall(r"\s+|[^\s]+", new)
    shown = ""
    for kind, a, b, c, d in difflib.SequenceMatcher(None, old_words, new_words, autojunk=False).get_opcodes():
        before, after = _text("".join(old_words[a:b])), _text("".join(new_words[c:d]))
        if kind == "equal":
            shown += before
            continue
        shown += (f"<del>{before}</del>" if before else "") + (f"<ins>{after}</ins>" if after else "")
    return shown
