"""The page of an evaluation: escaped, offline, with what changed."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from moe_train.evaluate.suites.page import page

RESULT: dict[str, Any] = {
    "model": "<new>",
    "weights": [{"model": "<new>", "checkpoint": None, "sha256": "00"}],
    "suites": [{"suite": "kpi", "score": 0.5, "categories": {"<b>": 0.25}, "digest": "d"}],
    "comparisons": [{"suite": "kpi", "against": "old", "verdict": "worse"}],
    "requirements": [{"suite": "kpi", "met": False}],
}


def row(new: tuple[str, float | None], old: tuple[str, float | None]) -> dict[str, Any]:
    answers = {}
    for name, (text, score) in (("<new>", new), ("old", old)):
        answers[name] = {"text": text, "score": score, "finished": True, "problem": None if score is not None else "no verdict"}
    question = [{"role": "user", "content": "<script>alert(1)</script>"}]
    return {
        "suite": "kpi",
        "id": "1",
        "where": "i:1",
        "category": None,
        "messages": question,
        "expected": ["x"],
        "answers": answers,
    }


def test_page() -> None:
    pairs = [(("a b", 0), ("a c", 1)), (("a", 1), ("b", 0)), (("a", 1), ("b", 1)), (("a", 1), ("a", 1)), (("a", None), ("a", 1))]
    text = page(RESULT, [row(new, old) for new, old in pairs])
    changes = [part.partition('"')[0] for part in text.split('<details class="')[1:]]
    assert changes == ["lost", "gained", "changed", "same", "changed"]
    assert "a <del>c</del><ins>b</ins>" in text and "not graded: no verdict" in text
    tags: list[str] = []
    attributes: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)
            attributes.extend(name for name, _ in attrs)

    Reader().feed(text)
    # No code, nothing that is loaded, and no tag of an item's text.
    assert not {"script", "link", "img", "iframe", "b", "new"} & set(tags)
    assert not {"src", "href"} & set(attributes) and not any(name.startswith("on") for name in attributes)


def test_without_a_comparison_all_items_are_shown() -> None:
    text = page(RESULT | {"comparisons": [], "requirements": []}, [row(("a", 1), ("a", 1))])
    assert "id=all checked" in text and "Requirements" not in text
