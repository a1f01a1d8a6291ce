"""Rules for turns: roles, their order, an answer at the end, and which answers are trained on.

A rule yields a message for each place that breaks it. Its `fix_…` edits the conversation in place where only one correction
is right, and yields what it changed.
"""

from __future__ import annotations

from collections.abc import Iterator

from moe_train.data.check.requirements import Requirements
from moe_train.data.records.media import has_media
from moe_train.data.records.normal_form import ROLES, Conversation, Message, texts_of
from moe_train.data.records.problem import brief

OTHER_NAMES = {
    "human": "user", "customer": "user", "gpt": "assistant", "bot": "assistant", "chatbot": "assistant", "model": "assistant",
    "ai": "assistant", "developer": "system", "function": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
"""Other names of roles -> our names."""


def bad_role(conversation: Conversation, form: Requirements) -> Iterator[str]:
    """Find messages with an unknown role."""
    for i, message in enumerate(conversation.messages):
        if message["role"] not in ROLES:
            yield f"message {i} has the unknown role {brief(message['role'])}"


def normal_role(role: object) -> str:
    """Return our name for a role; for an unknown role, the name in lower case."""
    name = str(role).strip().lower()
    return OTHER_NAMES.get(name, name)


def fix_role(conversation: Conversation, form: Requirements) -> Iterator[str]:
    """Replace other names of roles by ours."""
    for i, message in enumerate(conversation.messages):
        role = message["role"]
        new_role = normal_role(role)
        # An unknown role stays: which one is meant would be a guess.
        if new_role != role and new_role in ROLES:
            message["role"] = new_role
            yield f"message {i}: role {role} is {new_role} here"


def system_not_first(conversation: Conversation, form: Requirements) -> Iterator[str]:
    """Find system messages after the start."""
    for i, message in enumerate(conversation.messages[1:], start=1):
        if message["role"] == "system":
            yield f"message {i} is a system message, which stands first and once"


def fix_system_not_first(conversation: Conversation, form: Requirements) -> Iterator[str]:
    """Move a single system message to the start if no answer is before it, or join several that are at the start."""
    messages = conversation.messages
    systems = [i for i, message in enumerate(messages) if message["role"] == "system"]
    # An answer before it was given without it.
    is_late = any(message["role"] == "assistant" for message in messages[: systems[0]]) if systems else False
    if len(systems) == 1 and systems[0] > 0 and not is_late:
        messages.insert(0, messages.pop(systems[0]))
        yield f"the system message moved from place {systems[0]} to the start"
    elif len(systems) > 1 and systems == list(range(len(systems))):
        # Contents with parts are left to the author: how their texts would be joined depends on the chat template.
        texts = [messages[i]["content"] for i in systems]
        if not all(isinstance(text, str) for text in texts):
            return
        messages[: len(systems)] = [{"role": "system", "content": "\n\n".join(texts)}]
        yield f"{len(systems)} system messages joined"


def role_order(conversation: Conversation, form: Requirements) -> Iterator[str]:
    """Find messages whose role may not follow the role before it."""
    # `system-first` judges where system messages stand.
    turns = [(i, message) for i, message in enumerate(conversation.messages) if message["role"] != "system"]
    before: Message | None = None
    for i, message in turns:
        role = message["role"]
        if role not in ROLES:
            return  # `bad_role` reports it; what may follow it is unknown
        allowed: tuple[str, ...]
        if before is None:
            after = "at the start"
            allowed = ("user",)
        elif before["role"] == "user":
            after = "after user"
            allowed = ("assistant",)
        elif before["role"] == "tool":
            after = "after tool"
            allowed = ("assistant", "tool")
        elif "tool_calls" in before:
            after = "after a call"
            allowed = ("tool",)
        else:
            after = "after assistant"
            allowed = ("user",)
        unanswered_call = after == "after a call" and role == "assistant"  # `call-result` reports this more precisely
        if role not in allowed and not unanswered_call:
            yield f"message {i} is {role} {after}, where {' or '.join(allowed)} should be"
        before = message


def fix_role_order(conversation: Conversation, form: Requirements) -> Iterator[str]:
    """Join consecutive messages of the user, as mistral-common does, if both are text.

    Consecutive answers stay: they may be alternatives, and a joined one would be trained on although nobody wrote it.
    """
    messages = conversation.messages
    i = 1
    while i < len(messages):
        previous = messages[i - 1]
        current = messages[i]
        are_questions = previous["role"] == current["role"] == "user"
        texts = isinstance(previous.get("content"), str) and isinstance(current.get("content"), str)
        if are_questions and texts and "tool_calls" not in previous and "tool_calls" not in current:
            previous["content"] += "\n\n" + current["content"]
            del messages[i]  # and compare the next message with the joined one
            yield f"message {i} joined to the user message before it"
        else:
            i += 1


def unanswered_end(conversation: Conversation, form: Requirements) -> Iterator[str]:
    """Find a conversation that does not end with an assistant message."""
    last = conversation.messages[-1]
    if last["role"] != "assistant":
        yield f"the last message is {last['role']}, so nothing answers it"


def fix_unanswered_end(conversation: Conversation, form: Requirements) -> Iterator[str]:
    """Cut off the messages after the last answer."""
    cut = 0
    while conversation.messages and conversation.messages[-1]["role"] != "assistant":
        conversation.messages.pop()
        cut += 1
    if cut:
        yield f"{cut} messages after the last answer cut off"


def _visible_text(message: Message) -> str:
    """Return the text of a message, without its reasoning."""
    return "".join(texts_of(message)).strip()


def empty_answer(conversation: Conversation, form: Requirements) -> Iterator[str]:
    """Find assistant messages without text or calls."""
    for i, message in enumerate(conversation.messages):
        if message["role"] == "assistant" and "tool_calls" not in message and not _visible_text(message):
            yield f"message {i} is an assistant turn without text"


def empty_question(conversation: Conversation, form: Requirements) -> Iterator[str]:
    """Find user messages without text, pictures and sound, to which any answer would be learnt."""
    for i, message in enumerate(conversation.messages):
        if message["role"] == "user" and not _visible_text(message) and not has_media(message):
            yield f"message {i} is a user turn without text"


def fix_empty_answer(conversation: Conversation, form: Requirements) -> Iterator[str]:
    """Cut the conversation before the question that gets an empty answer.

    The messages before it are complete; those after it would continue a broken conversation.
    """
    for i, message in enumerate(conversation.messages):
        if message["role"] == "assistant" and "tool_calls" not in message and not _visible_text(message):
            # Up to the answer before, so that the question goes as well.
            keep = max((k for k in range(i) if conversation.messages[k]["role"] == "assistant"), default=-1) + 1
            cut = len(conversation.messages) - keep
            del conversation.messages[keep:]
            yield f"{cut} messages cut off, from the question that message {i} leaves unanswered"
            return


def no_loss(conversation: Conversation, form: Requirements) -> Iterator[str]:
    """Find conversations in which no assistant message is trained on."""
    answers = [message for message in conversation.messages if message["role"] == "assistant"]
    if not answers:
        yield "the record has no assistant turn"
    elif not any(message.get("weight", 1) for message in answers):
        yield "every assistant turn has weight 0"
