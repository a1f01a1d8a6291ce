"""The rules for records, and what can be corrected without guessing.

`problems` lists every rule that a text or a conversation (in the normal form of `conversation`) breaks. `repair` corrects the
record where only one correction is right (another name of a role, an id of the wrong length, turns after the last answer);
call `problems` again to see whether that was enough. The rules come from mistral-common's validator in its fine-tuning mode
and from mistral-finetune's data check.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

from moe_train.data.check import call_rules as calls
from moe_train.data.check import text_rules as texts
from moe_train.data.check import turn_rules as turns
from moe_train.data.check.pair_rules import pair_problems
from moe_train.data.check.requirements import Requirements
from moe_train.data.records.answers import conversations_of
from moe_train.data.records.normal_form import ClassifiedText, Conversation, LabelledAnswer, NormalRecord, PreferencePair
from moe_train.data.records.problem import Problem, brief


class Rule(NamedTuple):
    """A rule for conversations."""

    name: str
    """The name in reports."""
    remedy: str
    """The advice for a record that breaks the rule."""
    broken: Callable[[Conversation, Requirements], Iterator[str]]
    """Yields a message for each place that breaks the rule."""
    fix: Callable[[Conversation, Requirements], Iterator[str]] | None = None
    """Corrects the conversation in place, and yields the changes; None if that would be a guess."""


UNICODE = Rule("unicode", "remove it", texts.unusable_characters, texts.fix_unusable_characters)
CONTROL_TOKEN = Rule(
    "control-token", "write it otherwise: a model must not learn that users can type it", texts.typed_control_tokens
)
REASONING_AS_TEXT = Rule(
    "reasoning-as-text",
    "write it as reasoning_content, or as a part of type thinking; --allow reasoning-as-text trains on the letters",
    texts.reasoning_as_text,
)

# In the order of repairs: names first, then the order of messages, then cutting off.
RULES = (
    UNICODE,
    CONTROL_TOKEN,
    REASONING_AS_TEXT,
    Rule(
        "role",
        "roles are system, user, assistant, tool; --fix renames usual ones, and roles of record in a config any others",
        turns.bad_role,
        turns.fix_role,
    ),
    Rule("system-first", "put it first, or drop the record", turns.system_not_first, turns.fix_system_not_first),
    Rule("empty-assistant", "write the answer, or cut the conversation before it", turns.empty_answer, turns.fix_empty_answer),
    Rule("empty-user", "write the question, or drop the record", turns.empty_question),
    Rule("role-order", "after an optional system message, user and assistant take turns", turns.role_order, turns.fix_role_order),
    Rule("call-role", "only the assistant calls tools", calls.caller),
    Rule("function-name", "a name has 1 to 64 of a-z, A-Z, 0-9, _ and -", calls.function_name),
    Rule("call-id", "an id has 9 of a-z, A-Z, 0-9, the same at the call and its result", calls.call_id, calls.fix_call_id),
    Rule("call-result", "each call is followed by one tool message with its id as tool_call_id", calls.unpaired),
    Rule("last-turn", "end with an assistant turn: there is nothing else to learn", turns.unanswered_end, turns.fix_unanswered_end),
    Rule("no-loss", "give an assistant turn weight 1, or drop the record", turns.no_loss),
)


def problems(record: NormalRecord, form: Requirements) -> Iterator[Problem]:
    """Yield a problem for every rule that the record breaks, in the order of the rules."""
    match record:
        case str():
            yield from _text_problems(record, form)
        case Conversation():
            yield from _conversation_problems(record, form)
        case ClassifiedText(content=content):
            for problem in problems(content, form):
                # A text with labels need not end with an answer.
                if problem.rule not in ("last-turn", "no-loss"):
                    yield problem
        case PreferencePair() | LabelledAnswer():
            yield from pair_problems(record)
            seen: set[tuple[str, str]] = set()  # problems of the prompt, which both conversations have
            for name, conversation in conversations_of(record):
                for problem in _conversation_problems(conversation, form):
                    if (problem.rule, problem.message) not in seen:
                        seen.add((problem.rule, problem.message))
                        yield Problem(problem.rule, f"{name}: {problem.message}" if name else problem.message, problem.remedy)


def _conversation_problems(record: Conversation, form: Requirements) -> Iterator[Problem]:
    """Yield the problems of a conversation."""
    badly_typed = [Problem("type", message, _TYPE_REMEDY) for message in _types(record)]
    yield from badly_typed
    if not badly_typed:  # the other rules rely on the types
        for rule in RULES:
            for message in rule.broken(record, form):
                yield Problem(rule.name, message, rule.remedy)


def repair(record: str | Conversation, form: Requirements) -> tuple[str | Conversation, list[tuple[str, str]]]:
    """Return a copy in which everything is corrected that has only one right correction.

    Returns:
        The copy, and (rule, what was changed) for each change.
    """
    if isinstance(record, str):
        text, change = texts.replaced(record)
        return text, [(UNICODE.name, change)] if change else []
    # Corrections rely on the types, as the rules do.
    if any(_types(record)):
        return record, []
    # A deep copy, since each `fix` edits messages and calls in place.
    record = copy.deepcopy(record)
    changes: list[tuple[str, str]] = []
    for rule in RULES:
        if rule.fix is not None:
            changes += [(rule.name, change) for change in rule.fix(record, form)]
    return record, changes


def _text_problems(text: str, form: Requirements) -> Iterator[Problem]:
    """Yield the problems of a plain text."""
    if not text or text.isspace():
        yield Problem("empty-text", "the record has no text", "drop it")
    if fault := texts.unusable_character(text):
        yield Problem(UNICODE.name, f"the text {fault}", UNICODE.remedy)
    if fault := texts.typed_control_token(text, form):
        yield Problem(CONTROL_TOKEN.name, f"the text {fault}", CONTROL_TOKEN.remedy)


_TYPE_REMEDY = 'messages are {"role", "content"}, calls {"id", "function": {"name", "arguments"}}, tools {"function": {"name", …}}'


def _types(conversation: Conversation) -> Iterator[str]:
    """Yield a message for each value of the wrong type."""
    for i, message in enumerate(conversation.messages):
        if not isinstance(message.get("role"), str):
            yield f"message {i} has role {brief(message.get('role'))}, which should be text"
        if not _is_content(message.get("content", "")):
            yield f"the content of message {i} should be text, not {brief(message['content'])}"
        # Types are checked before `fix_role`, so the role may still have one of its other names.
        elif "content" not in message and ("tool_calls" not in message or turns.normal_role(message.get("role")) != "assistant"):
            yield f"message {i} has no content"
        if not isinstance(message.get("tool_call_id", ""), str):
            yield f"tool_call_id of message {i} should be text, not {brief(message['tool_call_id'])}"
        for call in message.get("tool_calls", ()):
            if not (isinstance(call, dict) and _is_function(call.get("function")) and isinstance(call.get("id", ""), str)):
                yield f"a call in message {i} should have id and function (name, arguments), not {brief(call)}"
    for i, tool in enumerate(conversation.tools):
        if not (isinstance(tool, dict) and _is_function(tool.get("function"))):
            yield f"tool {i} should have function (name, description, parameters), not {brief(tool)}"


def _is_content(value: object) -> bool:
    """Return whether a value is text, or a list of parts in the normal form."""
    if isinstance(value, str):
        return True
    return isinstance(value, list) and bool(value) and all(isinstance(part, dict) and part.get("type") in part for part in value)


def _is_function(value: object) -> bool:
    """Return whether a value is a function with a name."""
    return isinstance(value, dict) and isinstance(value.get("name"), str)
