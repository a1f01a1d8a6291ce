"""Check that everything that was said is in the renderings of a conversation, in order.

A template may leave out a system text, the text beside a call, or the reasoning of earlier turns.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence, Set
from typing import Any, NamedTuple

from moe_train.data.chat.example import OTHER_TEMPLATE, turns
from moe_train.data.records.normal_form import Conversation, Message
from moe_train.data.records.problem import Problem, brief
from moe_train.data.tokenizers.tokenizer import Span
from moe_train.machine.files import JsonObject


class LeftOut(Problem):
    """Something that was said is missing from the rendering."""


class Rendering(NamedTuple):
    """A rendered text."""

    text: str
    trained_on: Sequence[Span]
    """The spans of its characters that are trained on."""
    end: int
    """Number of messages of the conversation that are rendered."""


class _SourceText(NamedTuple):
    """A text that the rendering has to contain."""

    message: int
    role: str
    description: str
    """What it is, in words."""
    text: str


def _source_texts(conversation: Conversation, i: int) -> Iterator[_SourceText]:
    """Yield every text of a message."""
    message = conversation.messages[i]
    role = message["role"]
    calls = message.get("tool_calls") or []
    content = message.get("content") or ""
    # A part holds its text under the name of its type: {"type": "thinking", "thinking": "…"}.
    for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
        text = part.get(part.get("type", "text"))
        if isinstance(text, str) and text.strip():
            yield _SourceText(i, role, _description(role, part, bool(calls)), text.strip())
    for call in calls:
        function = call["function"]
        yield _SourceText(i, role, "the name of a call", function["name"])
        for value in _values(function.get("arguments", "")):
            yield _SourceText(i, role, "an argument of a call", value)


def _description(role: str, part: JsonObject, has_calls: bool) -> str:
    """Describe a part of a message in words."""
    if part.get("type") == "thinking":
        return "the reasoning"
    if role == "tool":
        return "the result"
    return "the text beside the calls" if has_calls else "the text"


def _values(arguments: Any) -> Iterator[str]:
    """Yield the names and values of a call's arguments as texts."""
    yield from _texts_in(_parsed(arguments))


def _parsed(arguments: Any) -> Any:
    """Return the value of arguments that are JSON text; others stay as they are."""
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(arguments or "{}")
    return arguments


def _texts_in(value: Any) -> Iterator[str]:
    """Yield the texts, names and numbers in a JSON value; constants may be spelled in several ways."""
    match value:
        case str():
            if value.strip():
                yield value.strip()
        # Before `int`, of which bool is a subclass.
        case bool() | None:
            return
        case int() | float():
            yield json.dumps(value)
        case list():
            for item in value:
                yield from _texts_in(item)
        case dict():
            for name, item in value.items():
                yield from _texts_in(name)
                yield from _texts_in(item)


def check_complete(conversation: Conversation, renderings: Sequence[Rendering], template: str) -> str:
    """Check that everything that was said is in one of the texts, in order; return what the template wrote around it."""
    for tool in conversation.tools:
        name = tool["function"]["name"]
        if not any(name in rendering.text or _find(rendering.text, name) for rendering in renderings):
            raise _left_out(_SourceText(0, "", f"the tool {name}", name))
    locations = [_locate(conversation, rendering) for rendering in renderings]
    rendered = conversation._replace(messages=conversation.messages[: max(rendering.end for rendering in renderings)])
    missing = _missing(rendered, locations, set())
    # Mistral's v2 writes calls and results only after the last user turn. What it omits could be found by chance in other words,
    # so nothing of it is searched for.
    omitted = _older_exchanges(rendered.messages) if missing and "[TOOL_RESULTS]" in template else set()
    if omitted:
        locations = [_locate(conversation, rendering, omitted) for rendering in renderings]
        missing = _missing(rendered, locations, omitted)
    if missing is not None:
        raise _left_out(_first_missing(conversation, renderings, omitted) or missing)
    for rendering, located in zip(renderings, locations, strict=True):
        _check_questions(conversation, rendering, located)
    # One rendering is enough, and to search all of them would take time that grows with the cube of the number of calls.
    _check_arguments(conversation, max(renderings, key=lambda rendering: rendering.end))
    return "\n".join(
        _outside(rendering.text, list(located.values())) for rendering, located in zip(renderings, locations, strict=True)
    )


def _check_questions(conversation: Conversation, rendering: Rendering, located: dict[_SourceText, Span]) -> None:
    """Raise LeftOut if a rendering lacks what the user said, which no template may forget in later turns.

    A system text may be missing there: Mistral's v3 writes it into a last message of the user only, and so not after a result.
    """
    for i in range(rendering.end):
        if conversation.messages[i]["role"] != "user":
            continue
        for source in _source_texts(conversation, i):
            if source not in located and not _find(rendering.text, source.text):
                raise _left_out(source)


def _check_arguments(conversation: Conversation, rendering: Rendering) -> None:
    """Raise Problem if a rendering has the arguments of a call as Python writes an object, which no server parses."""
    for i, message in enumerate(conversation.messages[: rendering.end]):
        for call in message.get("tool_calls") or []:
            arguments = _parsed(call["function"].get("arguments", ""))
            if not isinstance(arguments, dict) or str(arguments) not in rendering.text:
                continue
            # Both spellings are alike for an empty object, and for names with an apostrophe whose values hold no text.
            if _parsed(str(arguments)) == arguments:
                continue
            if any(str(arguments) in source.text for k in range(rendering.end) for source in _source_texts(conversation, k)):
                continue  # somebody said it
            what = f"the chat template writes the arguments of a call of message {i} as Python does, and not as JSON"
            remedy = f"write them with the filter tojson, or name another template {OTHER_TEMPLATE}"
            raise Problem("template", f"{what}: {brief(str(arguments))}", remedy)


def _missing(conversation: Conversation, locations: Sequence[dict[_SourceText, Span]], omitted: set[int]) -> _SourceText | None:
    """Return the first text, of the messages that are not omitted, that is located in no rendering; None if there is none."""
    for i in range(len(conversation.messages)):
        for source in _source_texts(conversation, i) if i not in omitted else ():
            if not any(source in located for located in locations):
                return source
    return None


def _older_exchanges(messages: list[Message]) -> set[int]:
    """Return the calls and results before the last user turn; `check_trained` finds those that are trained on."""
    last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=0)
    return {i for i in range(last_user) if messages[i]["role"] == "tool" or "tool_calls" in messages[i]}


def _locate(conversation: Conversation, rendering: Rendering, omitted: Set[int] = frozenset()) -> dict[_SourceText, Span]:
    """Find what was said in a text, from the last message to the first, since it is older messages that templates omit.

    Args:
        conversation: The conversation.
        rendering: The text.
        omitted: Indices of messages that are not searched for.
    """
    located: dict[_SourceText, Span] = {}
    limit = len(rendering.text)
    for i in reversed(range(rendering.end)):
        starts = [limit]
        for source in _source_texts(conversation, i) if i not in omitted else ():
            system = source.role == "system"  # which may be written later than the messages that follow it
            span = _find(rendering.text, source.text, None if system else limit)
            if span is not None:
                located[source] = span
                starts.append(limit if system else span[0])
        limit = min(starts)
    return located


def _outside(text: str, spans: list[Span]) -> str:
    """Return the parts of a text that are in none of the spans, one per line."""
    parts = []
    position = 0
    for start, end in sorted(spans):
        parts.append(text[position:start])
        # Spans may overlap: an argument can be found within another one.
        position = max(position, end)
    parts.append(text[position:])
    return "\n".join(parts)


def _first_missing(conversation: Conversation, renderings: Sequence[Rendering], omitted: set[int]) -> _SourceText | None:
    """Return the first text that is in no rendering: more likely what is left out than one that is out of order."""
    for i in range(max(rendering.end for rendering in renderings)):
        for source in _source_texts(conversation, i) if i not in omitted else ():
            if not any(_find(rendering.text, source.text) for rendering in renderings):
                return source
    return None


def _left_out(source: _SourceText) -> LeftOut:
    """Return the problem that something is not in the rendering."""
    location = f" of message {source.message} ({source.role})" if source.role else ""
    detail = f" {brief(source.text)}" if source.role else ""
    remedy = f"name a template that writes it {OTHER_TEMPLATE}, or leave it out of the record"
    return LeftOut("template", f"the chat template leaves out {source.description}{location}:{detail}".removesuffix(":"), remedy)


def _find(text: str, source: str, limit: int | None = None) -> Span | None:
    """Find the last occurrence of what was said before a position: as it stands, as JSON, or as JSON that was spelled anew."""
    start = text.rfind(source, 0, limit)
    span = None if start < 0 else (start, start + len(source))
    # Within a JSON text, quotes and line breaks are escaped, and with ensure_ascii also other characters. The last occurrence
    # may be such a one though an earlier message has the text as it stands: a call that writes what a result has read.
    for ascii_only in (False, True):
        escaped = json.dumps(source, ensure_ascii=ascii_only)[1:-1]
        if escaped == source:
            continue
        start = text.rfind(escaped, 0 if span is None else span[1], limit)
        if start >= 0:
            span = start, start + len(escaped)
    return span or _find_json(text, source, limit)


def _find_json(text: str, source: str, limit: int | None) -> Span | None:
    """Find JSON that the template parsed and wrote again: its words, close together."""
    if source[:1] not in ("{", "[") or source[-1:] not in ("}", "]"):
        return None
    end = None
    floor = 0  # words farther away belong to something else
    # Only words are compared, since white space between them may differ.
    for word in reversed(re.findall(r"\w+", source)):
        limit = text.rfind(word, floor, limit)
        if limit < 0:
            return None
        if end is None:
            end = limit + len(word)
            floor = max(0, end - 8 * len(source) - 200)
    return None if end is None or limit is None else (limit, end)


def check_trained(conversation: Conversation, renderings: Sequence[Rendering]) -> None:
    """Check that what the assistant said in trained turns is in the trained spans, in order."""
    pieces: list[str] = []
    for rendering in renderings:
        pieces += [rendering.text[start:end] for start, end in rendering.trained_on]
    # A separator, so that the ends of two spans do not read as one word.
    trained = "\n".join(pieces)
    limit = len(trained)
    for turn in reversed(turns(conversation.messages)):
        for i in reversed(range(turn.start, turn.end)) if turn.trained_on else ():
            starts = [limit]
            for source in _source_texts(conversation, i):
                span = _find(trained, source.text, limit)
                if span is None:
                    raise _left_out(source._replace(description=f"from what is trained on {source.description}"))
                starts.append(span[0])
            limit = min(starts)
