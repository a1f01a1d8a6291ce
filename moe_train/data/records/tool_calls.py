"""Tool calls in every spelling: OpenAI's, Mistral's, Anthropic's, LangChain's, and calls inside of JSON text."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from moe_train.data.records.json_parser import parse_strictly
from moe_train.data.records.meaning import CALL, CALLED_FUNCTION
from moe_train.data.records.normal_form import Message
from moe_train.data.records.problem import Problem, brief
from moe_train.data.records.unread import Unread

_ARGUMENTS = ("arguments", "parameters", "input", "args")
_KINDS = ("function", "tool_call", "tool_use")
_REMEDY = 'write {"name": …, "arguments": {…}}'


class CallIds:
    """The calls of a conversation so far, to number calls without ids and to find the call that a result answers."""

    def __init__(self) -> None:
        self.count = 0
        self._unanswered: dict[str, str] = {}  # id -> name of the function
        self._numbered: set[str] = set()

    def numbered(self, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the calls of a message of a spelling that has no ids, with numbers as their ids."""
        numbered_calls = []
        for number, call in enumerate(calls, start=self.count):
            if "id" not in call:
                # Nine characters, as Mistral's v3 format demands of an id.
                call = {"id": f"call{number:05d}", **call}
                self._numbered.add(call["id"])
            numbered_calls.append(call)
        return numbered_calls

    def add(self, message: Message) -> None:
        """Note the calls or the result of the next message."""
        for call in message.get("tool_calls", ()):
            self.count += 1
            if isinstance(call.get("id"), str):
                self._unanswered[call["id"]] = call["function"]["name"]
        answered = message.get("tool_call_id")
        if isinstance(answered, str):
            self._unanswered.pop(answered, None)

    def unanswered(self, name: str | None = None, by_number: bool = False) -> str | None:
        """Return the id of the first call that has no result yet; None if there is none.

        Args:
            name: The function that it calls; None for any.
            by_number: Whether only calls that were numbered here are meant, since others state their ids in their results.
        """
        for call_id, called in self._unanswered.items():
            if name in (None, called) and (call_id in self._numbered or not by_number):
                return call_id
        return None


def read_calls(value: Any, location: str, unread: Unread) -> list[dict[str, Any]]:
    """Convert a list of calls, one call, or the JSON text of either, to the normal form.

    Raises:
        Problem: If a value is no call.
    """
    if isinstance(value, str):
        try:
            value = parse_strictly(value)
        except ValueError as error:
            raise Problem("arguments", f"{location} has calls of {brief(value)}, which is not JSON ({error})", _REMEDY) from None
    calls = [value] if isinstance(value, dict) else value
    if not isinstance(calls, list | tuple):
        raise Problem("type", f"{location} has calls of {brief(value)}, which should be a list", "write a list of calls")
    return [_call(call, location, unread) for call in calls]


def _call(call: Any, location: str, unread: Unread) -> dict[str, Any]:
    """Convert one call; the keys of its function keep their order, which a template may write."""
    # Each call may be JSON text of its own; other text fails just below, with a message about calls.
    if isinstance(call, str):
        with contextlib.suppress(ValueError):
            call = parse_strictly(call)
    if not isinstance(call, dict):
        raise Problem("arguments", f"a call in {location} is {brief(call)}, which is no call", _REMEDY)
    remaining = unread.opened(CALL, call)
    kind = remaining.pop("type", "function")
    if kind not in _KINDS:
        raise Problem("type", f"{location} has a call of type {brief(kind)}", "only functions can be called; drop the record")
    normal: dict[str, Any] = {}
    # Only the first is taken, so a second id is left and named as not read.
    for key in ("id", "call_id", "tool_call_id"):
        if key in remaining and "id" not in normal:
            normal["id"] = remaining.pop(key)
    normal["type"] = "function"
    if "function" in remaining:
        inner = remaining.pop("function")
        if not isinstance(inner, dict):
            message = f"a call in {location} should have id and function (name, arguments), not {brief(call)}"
            raise Problem("type", message, _REMEDY)
        remaining = without_repeated(remaining, inner)
        inner = unread.opened(CALLED_FUNCTION, inner)
        normal["function"] = _function(inner, location)
        unread.close(f"a call in {location}", CALLED_FUNCTION, inner)
    else:
        normal["function"] = _function(remaining, location)
    unread.close(f"a call in {location}", CALL, remaining)
    return normal


def without_repeated(outer: dict[str, Any], inner: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object without the keys that an object inside of it repeats with the same value."""
    return {key: value for key, value in outer.items() if key not in inner or inner[key] != value}


def _function(remaining: dict[str, Any], location: str) -> dict[str, Any]:
    """Take the name and the arguments out of an object."""
    name = remaining.get("name")
    if not isinstance(name, str):
        raise Problem("type", f"a call in {location} is {brief(remaining)}, and has no name", _REMEDY)
    present = [key for key in _ARGUMENTS if key in remaining]
    if not present:
        message = f"{location} calls {brief(name)} without arguments"
        raise Problem("arguments", message, 'write "arguments": {} if it takes none')
    # Equal values under two names are harmless, and the last one is kept.
    if any(remaining[key] != remaining[present[0]] for key in present):
        message = f"{location} calls {brief(name)} with both {present[0]} and {present[1]}"
        raise Problem("arguments", message, "keep the one that is meant")
    function: dict[str, Any] = {}
    for key in list(remaining):
        if key == "name":
            function["name"] = remaining.pop(key)
        elif key in _ARGUMENTS:
            function["arguments"] = arguments_text(remaining.pop(key), f"{location} calls {brief(name)} with arguments")
    return function


def arguments_text(value: Any, what: str) -> str:
    """Return the JSON text of arguments, which are an object or its JSON text.

    Raises:
        Problem: If they are anything else, or not strictly JSON.
    """
    remedy = "write one JSON object, or its JSON text"
    if isinstance(value, dict):
        try:
            # Characters stay as they are, since escapes would be other tokens than those that the model sees in text.
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise Problem("arguments", f"{what} that have no form in JSON: {brief(value)} ({error})", remedy) from None
        _check_unicode(text, what)
        return text
    if not isinstance(value, str):
        raise Problem("arguments", f"{what} that are no object: {brief(value)}", remedy)
    try:
        arguments = parse_strictly(value)
    except ValueError as error:
        raise Problem("arguments", f"{what} that are not JSON: {brief(value)} ({error})", remedy) from None
    if not isinstance(arguments, dict):
        # Text inside of JSON text: the data were encoded twice, and decoding again would be a guess.
        kind = " after a second decoding" if isinstance(arguments, str) else ""
        raise Problem("arguments", f"{what} that are no object{kind}: {brief(value)}", remedy)
    # Chat formats write the decoded arguments, so an escape of half a surrogate pair becomes one.
    if "\\u" in value:
        _check_unicode(json.dumps(arguments, ensure_ascii=False), what)
    # Kept as written rather than dumped anew, with its spacing and its order of keys.
    return value


def _check_unicode(text: str, what: str) -> None:
    """Raise Problem if a text has half a surrogate pair, which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Problem("unicode", f"{what} that have half a surrogate pair: {brief(text)}", "remove it") from None
