"""The conversations of preference pairs and labelled answers, with the loss on the judged answers alone."""

from __future__ import annotations

from moe_train.data.records.normal_form import ClassifiedText, Conversation, LabelledAnswer, Message, NormalRecord, PreferencePair


def conversations_of(record: PreferencePair | LabelledAnswer) -> list[tuple[str, Conversation]]:
    """Return the conversations of a record, each with a name for it, or with "" if there is only one."""
    if isinstance(record, LabelledAnswer):
        return [("", record.conversation)]
    prompt = record.prompt
    answers = (("chosen", record.chosen), ("rejected", record.rejected))
    return [(name, prompt._replace(messages=[*prompt.messages, *answer])) for name, answer in answers]


def judged_conversations(record: NormalRecord) -> list[Conversation]:
    """Return the conversations of a record as they are tokenized: the turns before a judged answer bear no loss.

    A pair has two, chosen and rejected; a labelled answer and a plain conversation have one, and a text has none. The answer of a
    labelled conversation is everything after the last message of the user, calls of tools and their results included.
    """
    match record:
        case PreferencePair():
            conversations = []
            for answer in (record.chosen, record.rejected):
                messages = [*map(_without_loss, record.prompt.messages), *answer]
                conversations.append(record.prompt._replace(messages=messages))
            return conversations
        case LabelledAnswer():
            messages = record.conversation.messages
            start = len(messages) - len(judged_messages(record))
            judged = [*map(_without_loss, messages[:start]), *messages[start:]]
            return [record.conversation._replace(messages=judged)]
        case Conversation():
            return [record]
        case ClassifiedText():
            # Only a conversation that ends with an answer is rendered as in training by every reader.
            content = record.content
            return [content] if isinstance(content, Conversation) and content.messages[-1].get("role") == "assistant" else []
        case str():
            return []


def judged_messages(record: LabelledAnswer) -> list[Message]:
    """Return the messages after the last one of the user: the answer that the label judges."""
    messages = record.conversation.messages
    users = [i for i, message in enumerate(messages) if message.get("role") == "user"]
    return messages[users[-1] + 1 :] if users else messages


def _without_loss(message: Message) -> Message:
    """Return a message that is not trained on."""
    if message.get("role") != "assistant":
        return message
    return {key: value for key, value in message.items() if key != "pieces"} | {"weight": 0}
