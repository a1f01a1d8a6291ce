"""What a record has to be, one rule a function, and what can be put right without guessing.

`problems` names every rule that a text or a conversation (in the one form of `conversation`) breaks. `repair` changes
the conversation where there is one right answer (a role's other name, an id of the wrong length, turns after the last
answer); whether that was enough, `problems` says afterwards. Sources: mistral-common's validator in its fine-tuning mode
and mistral-finetune's data check.
"""

from __future__ import annotations

import collections
import copy
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from moe_train.data.conversation import Conversation, Message
from moe_train.data.fields import Problem, brief
from moe_train.data.tokenizer import HuggingFace, Mistral, Tokenizer

ROLES = ("system", "user", "assistant", "tool")
OTHER_NAMES = {
    "human": "user", "customer": "user", "gpt": "assistant", "bot": "assistant", "chatbot": "assistant", "model": "assistant",
    "ai": "assistant", "developer": "system", "function": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
_NINE = re.compile(r"[a-zA-Z0-9]{9}")
_FUNCTION = re.compile(r"[a-zA-Z0-9_-]{1,64}")
# NUL, the noncharacters that mark spans while a template is rendered, and halves of surrogate pairs.
_NO_TEXT = re.compile("[\x00\ufdd0-\ufdd3\ud800-\udfff]")


class Form(NamedTuple):
    """What a tokenizer asks of records: the control tokens that no text should hold, ids of nine characters."""

    control: re.Pattern[str]
    nine_character_ids: bool


def form_of(tokenizer: Tokenizer, template: str | None) -> Form:
    """The form that records should have for a tokenizer and its chat template."""
    if isinstance(tokenizer, Mistral):
        text = tokenizer.finetuning.instruct_tokenizer.tokenizer
        special = {text.id_to_piece(i) for i in range(text.n_words) if text.is_special(i)}
        # v1 writes its turns as plain text, so there [INST] is one too.
        special = {token for token in special if not re.fullmatch(r"\[control_\d+\]|<SPECIAL_\d+>", token)} | {"[INST]", "[/INST]"}
        version = int(re.sub(r"\D.*", "", text.version.value.lstrip("v")) or 0)
        return Form(_any_of(special), 3 <= version < 13)
    assert isinstance(tokenizer, HuggingFace)
    return Form(_any_of(set(tokenizer.special_tokens)), "[TOOL_CALLS]" in (template or ""))


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=lambda token: (-len(token), token)))) or "(?!)")


def problems(record: str | Conversation, form: Form) -> Iterator[Problem]:
    """Every rule that the record breaks, in the order of the rules."""
    if isinstance(record, str):
        yield from _text_problems(record, form)
        return
    badly_typed = [Problem("type", message, _TYPE_REMEDY) for message in _types(record, form)]
    yield from badly_typed
    if not badly_typed:  # the other rules count on it
        for rule in RULES:
            for message in rule.broken(record, form):
                yield Problem(rule.name, message, rule.remedy)


def repair(conversation: Conversation, form: Form) -> tuple[Conversation, list[tuple[str, str]]]:
    """A copy with everything put right that has one right answer, and (rule, what was changed) for each change."""
    if any(_types(conversation, form)):
        return conversation, []
    conversation = copy.deepcopy(conversation)
    changes = [(rule.name, change) for rule in RULES if rule.fix is not None for change in rule.fix(conversation, form)]
    return conversation, changes


def repair_text(text: str) -> tuple[str, list[tuple[str, str]]]:
    found = _NO_TEXT.findall(text)
    return _NO_TEXT.sub("\ufffd", text), [("unicode", f"{len(found)} characters replaced by U+FFFD")] if found else []


# --- text ------------------------------------------------------------------------------------------------------


def _text_problems(text: str, form: Form) -> Iterator[Problem]:
    if not text or text.isspace():
        yield Problem("empty-text", "the record has no text", "drop it")
    for name, find in (("unicode", _unusable), ("control-token", functools.partial(_controls, form=form))):
        for message in find(text):
            yield Problem(name, f"the text {message}", _REMEDIES[name])


def _unusable(text: str) -> Iterator[str]:
    if (not text.isascii() or "\0" in text) and (found := _NO_TEXT.search(text)):
        code = ord(found[0])
        kind = "NUL" if code == 0 else "half a surrogate pair" if code < 0xE000 else "a noncharacter"
        yield f"has {kind} (U+{code:04X}) at character {found.start()}"


def _controls(text: str, form: Form) -> Iterator[str]:
    if found := form.control.search(text):
        yield f"has the control token {found[0]} typed as text at character {found.start()}"


def _texts(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """Every text of a conversation that a tokenizer sees, and what to call it."""
    for i, message in enumerate(conversation.messages):
        if "content" in message:
            yield f"message {i} ({message['role']})", message["content"]
        for call in message.get("tool_calls", ()):
            yield f"a call in message {i}", call["function"]["name"]
            if isinstance(call["function"].get("arguments"), str):
                yield f"the arguments of a call in message {i}", call["function"]["arguments"]
    for i, tool in enumerate(conversation.tools):
        yield f"tool {i}", json.dumps(tool, ensure_ascii=False)


def _unicode(conversation: Conversation, form: Form) -> Iterator[str]:
    for name, text in _texts(conversation):
        for message in _unusable(text):
            yield f"{name} {message}"


def _fix_unicode(conversation: Conversation, form: Form) -> Iterator[str]:
    for i, message in enumerate(conversation.messages):
        if "content" in message:
            message["content"], changes = repair_text(message["content"])
            for _, change in changes:
                yield f"message {i}: {change}"


def _control_token(conversation: Conversation, form: Form) -> Iterator[str]:
    for name, text in _texts(conversation):
        for message in _controls(text, form):
            yield f"{name} {message}"


# --- types -----------------------------------------------------------------------------------------------------

_TYPE_REMEDY = 'messages are {"role", "content"}, calls {"id", "function": {"name", "arguments"}}, tools {"function": {"name", …}}'


def _types(conversation: Conversation, form: Form) -> Iterator[str]:
    for i, message in enumerate(conversation.messages):
        if not isinstance(message.get("role"), str):
            yield f"message {i} has role {brief(message.get('role'))}, which should be text"
        if not isinstance(message.get("content", ""), str):
            yield f"the content of message {i} should be text, not {brief(message['content'])}"
        elif "content" not in message and ("tool_calls" not in message or _known_role(message.get("role")) != "assistant"):
            yield f"message {i} has no content"
        if not isinstance(message.get("tool_call_id", ""), str):
            yield f"tool_call_id of message {i} should be text, not {brief(message['tool_call_id'])}"
        for call in message.get("tool_calls", ()):
            if not (isinstance(call, dict) and _is_function(call.get("function")) and isinstance(call.get("id", ""), str)):
                yield f"a call in message {i} should have id and function (name, arguments), not {brief(call)}"
    for i, tool in enumerate(conversation.tools):
        if not (isinstance(tool, dict) and _is_function(tool.get("function"))):
            yield f"tool {i} should have function (name, description, parameters), not {brief(tool)}"


def _is_function(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str)


# --- turns -----------------------------------------------------------------------------------------------------


def _role(conversation: Conversation, form: Form) -> Iterator[str]:
    for i, message in enumerate(conversation.messages):
        if message["role"] not in ROLES:
            yield f"message {i} has the unknown role {brief(message['role'])}"


def _known_role(role: Any) -> str:
    name = str(role).strip().lower()
    return OTHER_NAMES.get(name, name)


def _fix_role(conversation: Conversation, form: Form) -> Iterator[str]:
    for i, message in enumerate(conversation.messages):
        role = message["role"]
        known = _known_role(role)
        if known != role and known in ROLES:
            message["role"] = known
            yield f"message {i}: role {role} is {known} here"


def _system_first(conversation: Conversation, form: Form) -> Iterator[str]:
    for i, message in enumerate(conversation.messages[1:], start=1):
        if message["role"] == "system":
            yield f"message {i} is a system message, which stands first and once"


def _fix_system_first(conversation: Conversation, form: Form) -> Iterator[str]:
    messages = conversation.messages
    systems = [i for i, message in enumerate(messages) if message["role"] == "system"]
    if len(systems) == 1 and systems[0] > 0:
        messages.insert(0, messages.pop(systems[0]))
        yield f"the system message moved from place {systems[0]} to the start"
    elif len(systems) > 1 and systems == list(range(len(systems))):
        messages[: len(systems)] = [{"role": "system", "content": "\n\n".join(m["content"] for m in messages[: len(systems)])}]
        yield f"{len(systems)} system messages joined"


def _role_order(conversation: Conversation, form: Form) -> Iterator[str]:
    turns = [(i, message) for i, message in enumerate(conversation.messages) if message["role"] != "system"]
    before: Message | None = None
    for i, message in turns:
        role = message["role"]
        if role not in ROLES:
            return  # named already; what may follow it is anyone's guess
        wanted: tuple[str, ...]
        if before is None:
            after, wanted = "at the start", ("user",)
        elif before["role"] == "user":
            after, wanted = "after user", ("assistant",)
        elif before["role"] == "tool":
            after, wanted = "after tool", ("assistant", "tool")
        elif "tool_calls" in before:
            after, wanted = "after a call", ("tool",)
        else:
            after, wanted = "after assistant", ("user",)
        if role not in wanted and not (after == "after a call" and role == "assistant"):  # `call-result` says that better
            yield f"message {i} is {role} {after}, where {' or '.join(wanted)} should be"
        before = message


def _fix_role_order(conversation: Conversation, form: Form) -> Iterator[str]:
    """Neighbours of one role become one message, as mistral-common joins them, where both are text of one weight."""
    messages = conversation.messages
    i = 1
    while i < len(messages):
        one, two = messages[i - 1], messages[i]
        alike = one["role"] == two["role"] in ("user", "assistant") and one.get("weight") == two.get("weight")
        if alike and "tool_calls" not in one and "tool_calls" not in two:
            one["content"] += "\n\n" + two["content"]
            del messages[i]
            yield f"message {i} joined to the {one['role']} message before it"
        else:
            i += 1


def _last(conversation: Conversation, form: Form) -> Iterator[str]:
    last = conversation.messages[-1]
    if last["role"] != "assistant":
        yield f"the last message is {last['role']}, so nothing answers it"


def _fix_last(conversation: Conversation, form: Form) -> Iterator[str]:
    cut = 0
    while conversation.messages and conversation.messages[-1]["role"] != "assistant":
        conversation.messages.pop()
        cut += 1
    if cut:
        yield f"{cut} messages after the last answer cut off"


def _empty_assistant(conversation: Conversation, form: Form) -> Iterator[str]:
    for i, message in enumerate(conversation.messages):
        if message["role"] == "assistant" and "tool_calls" not in message and not message["content"].strip():
            yield f"message {i} is an assistant turn without text"


def _fix_empty_assistant(conversation: Conversation, form: Form) -> Iterator[str]:
    """What stands before the empty turn is whole; what comes after it answers an odd history."""
    for i, message in enumerate(conversation.messages):
        if message["role"] == "assistant" and "tool_calls" not in message and not message["content"].strip():
            keep = max((k for k in range(i) if conversation.messages[k]["role"] == "assistant"), default=-1) + 1
            cut = len(conversation.messages) - keep
            del conversation.messages[keep:]
            yield f"{cut} messages cut off, from the question that message {i} leaves unanswered"
            return


def _weight(conversation: Conversation, form: Form) -> Iterator[str]:
    for i, message in enumerate(conversation.messages):
        weight = message.get("weight", 1)
        if isinstance(weight, bool) or not isinstance(weight, int) or weight not in (0, 1):
            yield f"message {i} has weight {brief(weight)}"


def _fix_weight(conversation: Conversation, form: Form) -> Iterator[str]:
    for i, message in enumerate(conversation.messages):
        weight = message.get("weight", 1)
        text = str(weight).lower()
        meant = 1 if text in ("true", "1", "1.0") else 0 if text in ("false", "0", "0.0") else None
        if meant is not None and (weight != meant or type(weight) is not int):
            message["weight"] = meant
            yield f"message {i}: weight {brief(weight)} written as {meant}"


def _no_loss(conversation: Conversation, form: Form) -> Iterator[str]:
    answers = [message for message in conversation.messages if message["role"] == "assistant"]
    if not any(message.get("weight", 1) for message in answers):
        yield "the record has no assistant turn" if not answers else "every assistant turn has weight 0"


# --- tools -----------------------------------------------------------------------------------------------------


def _calls(conversation: Conversation) -> Iterator[tuple[int, dict[str, Any], bool]]:
    """Message number, call, and whether it is of the last message, which nothing answers."""
    last = len(conversation.messages) - 1
    for i, message in enumerate(conversation.messages):
        for call in message.get("tool_calls", ()):
            yield i, call, i == last


def _call_role(conversation: Conversation, form: Form) -> Iterator[str]:
    for i, message in enumerate(conversation.messages):
        if "tool_calls" in message and message["role"] != "assistant":
            yield f"message {i} is {message['role']}, and has tool_calls"


def _function_name(conversation: Conversation, form: Form) -> Iterator[str]:
    for i, call, _ in _calls(conversation):
        if not _FUNCTION.fullmatch(call["function"]["name"]):
            yield f"message {i} calls {brief(call['function']['name'])}"
    for i, tool in enumerate(conversation.tools):
        if not _FUNCTION.fullmatch(tool["function"]["name"]):
            yield f"tool {i} is named {brief(tool['function']['name'])}"


def _arguments(conversation: Conversation, form: Form) -> Iterator[str]:
    for i, call, _ in _calls(conversation):
        arguments = call["function"].get("arguments")
        if not isinstance(arguments, str):
            yield f"message {i} calls {call['function']['name']} with arguments that are no JSON text: {brief(arguments)}"
        elif not _is_json(arguments):
            yield f"message {i} calls {call['function']['name']} with arguments that are not JSON: {brief(arguments)}"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _fix_arguments(conversation: Conversation, form: Form) -> Iterator[str]:
    for i, call, _ in _calls(conversation):
        function = call["function"]
        arguments = function.get("arguments", {})
        if isinstance(arguments, dict):
            function["arguments"] = json.dumps(arguments, ensure_ascii=False)
            yield f"message {i}: the arguments of {function['name']} written as JSON text"


def _call_id(conversation: Conversation, form: Form) -> Iterator[str]:
    for i, call, is_last in _calls(conversation):
        name = call.get("id")
        if name is None and is_last:
            continue  # an id serves to find the result
        if not name:
            yield f"message {i} calls {call['function']['name']} without an id"
        elif form.nine_character_ids and not _NINE.fullmatch(name):
            yield f"message {i} calls {call['function']['name']} with the id {brief(name)}"


def _fix_call_id(conversation: Conversation, form: Form) -> Iterator[str]:
    """Results without an id answer calls in their order; ids that do not fit are renamed on both sides."""
    messages = conversation.messages
    for i, message in enumerate(messages):
        calls = message.get("tool_calls", ())
        results = [m for _, m in _results(messages, i)]
        unnamed = [call for call in calls if not call.get("id")]
        unclaimed = [m for m in results if m.get("tool_call_id") not in {call.get("id") for call in calls} - {None, ""}]
        if unnamed and len(unnamed) == len(unclaimed) and len(results) == len(calls):
            taken = {call.get("id") for call in calls}
            for call, result in zip(unnamed, unclaimed, strict=True):
                call["id"] = result["tool_call_id"] = _new_id(result.get("tool_call_id") or f"{i}.{calls.index(call)}", taken)
                yield f"message {i}: the call of {call['function']['name']} got the id {call['id']}"
        missing = [call for call in calls if call["id"] not in {m.get("tool_call_id") for m in results}] if not unnamed else []
        unclaimed = [m for m in results if m.get("tool_call_id") not in {call.get("id") for call in calls}]
        if len(missing) == len(unclaimed) == 1:  # one call and one result are left: they belong together
            yield f"the result of {missing[0]['function']['name']} had the id {brief(unclaimed[0].get('tool_call_id'))}"
            unclaimed[0]["tool_call_id"] = missing[0]["id"]
        if form.nine_character_ids:
            taken = {call.get("id") for call in calls}
            for call in calls:
                old = call.get("id")
                if old and not _NINE.fullmatch(old):
                    call["id"] = _new_id(old, taken)
                    for result in results:
                        if result.get("tool_call_id") == old:
                            result["tool_call_id"] = call["id"]
                    yield f"message {i}: the id {brief(old)} written as {call['id']}"


def _new_id(name: str, taken: set[Any]) -> str:
    """Nine characters that follow from `name`, so that a file is fixed the same way every time."""
    while (new := name if _NINE.fullmatch(name) else hashlib.sha256(name.encode()).hexdigest()[:9]) in taken:
        name += "."
    taken.add(new)
    return new


def _results(messages: list[Message], i: int) -> Iterator[tuple[int, Message]]:
    """The tool messages right after message `i`."""
    for k in range(i + 1, len(messages)):
        if messages[k]["role"] != "tool":
            return
        yield k, messages[k]


def _call_result(conversation: Conversation, form: Form) -> Iterator[str]:
    messages = conversation.messages
    for i, message in enumerate(messages):
        if "tool_calls" not in message or i == len(messages) - 1:
            continue
        ids = [call.get("id") for call in message["tool_calls"]]
        results = list(_results(messages, i))
        answered = collections.Counter(result.get("tool_call_id") for _, result in results)
        for name, count in collections.Counter(ids).items():
            if count > 1:
                yield f"message {i} has {count} calls with the id {brief(name)}"
            if not answered[name]:
                yield f"message {i} has a call with the id {brief(name)}, which no result answers"
        for k, result in results:
            name = result.get("tool_call_id")
            if name not in ids:
                yield f"message {k} is the result of {brief(name)}, which message {i} does not call"
            elif answered[name] > 1:
                yield f"message {k} answers {brief(name)}, which has {answered[name]} results"


# --- the rules -------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """A name for reports, what to do about it, how to find it, and how to put it right where that is no guess."""

    name: str
    remedy: str
    broken: Callable[[Conversation, Form], Iterator[str]]
    fix: Callable[[Conversation, Form], Iterator[str]] | None = None


# In the order in which they are repaired: names before order, order before what is cut off.
RULES = (
    Rule("unicode", "remove it", _unicode, _fix_unicode),
    Rule("control-token", "write it otherwise: a model must not learn that users can type it", _control_token),
    Rule("role", "roles are system, user, assistant, tool; other names go into record.roles", _role, _fix_role),
    Rule("weight", "a weight is 0 (no loss) or 1", _weight, _fix_weight),
    Rule("system-first", "put it first, or drop the record", _system_first, _fix_system_first),
    Rule("empty-assistant", "write the answer, or cut the conversation before it", _empty_assistant, _fix_empty_assistant),
    Rule("role-order", "after an optional system message, user and assistant take turns", _role_order, _fix_role_order),
    Rule("call-role", "only the assistant calls tools", _call_role),
    Rule("function-name", "a name has 1 to 64 of a-z, A-Z, 0-9, _ and -", _function_name),
    Rule("arguments", "write the arguments as JSON text", _arguments, _fix_arguments),
    Rule("call-id", "an id has 9 of a-z, A-Z, 0-9, the same at the call and its result", _call_id, _fix_call_id),
    Rule("call-result", "each call is followed by one tool message with its id as tool_call_id", _call_result),
    Rule("last-turn", "end with an assistant turn: there is nothing else to learn", _last, _fix_last),
    Rule("no-loss", "give an assistant turn weight 1, or drop the record", _no_loss),
)
_REMEDIES = {rule.name: rule.remedy for rule in RULES}
