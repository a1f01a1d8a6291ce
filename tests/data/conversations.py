"""Conversations as people and tools write them, drawn by hypothesis: system, several turns, calls, any text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

AWKWARD = [
    "</s>",
    "<s>",
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[/TOOL_RESULTS]",
    "[AVAILABLE_TOOLS]",
    "▁",
    "\\ufdd0",
    "\n\n",
    "{{ x }}",
]
NAMES = ["look_up", "get-weather", "f"]


def texts(min_size: int = 0) -> st.SearchStrategy[str]:
    """Any Unicode but half surrogates and the noncharacters that mark; what looks like a control token; short or long."""
    plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0\ufdd1\ufdd2\ufdd3"), max_size=20)
    words = st.sampled_from(["Grüße", "東京", "🙂", "a b", "  two", "ends ", "3.14", "x = {1: 2}", *AWKWARD])
    long = st.tuples(words, st.integers(50, 300)).map(lambda drawn: drawn[0] * drawn[1])
    joined = st.lists(st.one_of(words, plain), max_size=4).map("".join)
    return st.one_of(joined, plain, long).filter(lambda text: len(text) >= min_size)


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**9), 10**9), texts()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts(), inner, max_size=3)),
    max_leaves=5,
)


RESULTS = st.one_of(texts(1), VALUES.map(lambda value: json.dumps(value, ensure_ascii=False)))


@st.composite
def conversations(
    draw: st.DrawFn,
    *,
    tools: bool,
    max_calls: int = 3,
    content_beside_calls: bool = False,
    said: st.SearchStrategy[str] = texts(),  # noqa: B008
    answers: st.SearchStrategy[str] = texts(1),  # noqa: B008
    results: st.SearchStrategy[str] = RESULTS,
    parts: bool = False,
    thinking: Sequence[str] = (),
    thoughts: st.SearchStrategy[str] = texts(),  # noqa: B008
) -> dict[str, Any]:
    """A record: messages, and tools where they are wanted. Ends with an assistant turn of weight 1.

    With `parts`, contents may be lists of texts; messages of the roles in `thinking` may have reasoning.
    """
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(said)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(said)})
        for _ in range(draw(st.integers(0, 2)) if tools else 0):
            ids = draw(st.lists(st.from_regex(r"[a-zA-Z0-9]{9}", fullmatch=True), min_size=1, max_size=max_calls, unique=True))
            beside = {"content": draw(answers)} if content_beside_calls and draw(st.booleans()) else {}
            calls = [
                {"id": i, "type": "function", "function": {"name": draw(st.sampled_from(NAMES)), "arguments": _json(draw)}}
                for i in ids
            ]
            messages.append({"role": "assistant", "weight": draw(st.sampled_from([0, 1])), "tool_calls": calls, **beside})
            for i in ids:
                messages.append({"role": "tool", "tool_call_id": i, "name": "f", "content": draw(results)})
        messages.append({"role": "assistant", "weight": draw(st.sampled_from([0, 1])), "content": draw(answers)})
    messages[-1]["weight"] = 1
    for message in messages if parts or thinking else ():
        if "content" in message:
            message["content"] = draw(
                _contents(
                    message["content"], answers if parts else None, _thoughts(thoughts) if message["role"] in thinking else None
                )
            )
        elif "assistant" in thinking and draw(st.booleans()):
            message["content"] = [draw(_thoughts(thoughts))]
    if not tools:
        return {"messages": messages}
    named = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
    schema = {"type": "object", "properties": {"word": {"type": "string"}}}
    functions = [{"name": name, "description": draw(texts()), "parameters": schema} for name in named]
    return {"messages": messages, "tools": [{"type": "function", "function": function} for function in functions]}


def _thoughts(said: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"type": st.just("thinking"), "thinking": said}, optional={"closed": st.booleans()})


@st.composite
def _contents(
    draw: st.DrawFn, content: str, parts: st.SearchStrategy[str] | None, thinking: st.SearchStrategy[dict[str, Any]] | None
) -> str | list[dict[str, str]]:
    """A content that says more than the given one, in parts."""
    more = draw(st.lists(parts, max_size=2)) if parts is not None else []
    made = [{"type": "text", "text": text} for text in (content, *more)]
    thoughts = draw(st.lists(thinking, max_size=2)) if thinking is not None else []
    if not thoughts:
        return made if more else content
    leads = [draw(st.sampled_from([True, True, False])) for _ in thoughts]
    before = [thought for thought, leading in zip(thoughts, leads, strict=True) if leading]
    return before + made + [thought for thought, leading in zip(thoughts, leads, strict=True) if not leading]


def thinks(record: dict[str, Any]) -> bool:
    """Whether a turn of the record that is trained on has reasoning."""
    contents = [message.get("content") for message in record["messages"] if message.get("weight")]
    return any(isinstance(content, list) and any(part["type"] == "thinking" for part in content) for content in contents)


def _json(draw: st.DrawFn) -> str:
    return json.dumps(draw(st.dictionaries(texts(), VALUES, max_size=3)), ensure_ascii=draw(st.booleans()))
