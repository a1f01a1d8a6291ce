"""Settings and reasoning of a conversation: problems where the tokenizer or the chat template has no place for them."""

from __future__ import annotations

from moe_train.data.chat.example import is_trained_on
from moe_train.data.records.normal_form import Conversation, ModelSettings, reasoning_of
from moe_train.data.records.problem import Problem

NO_SETTINGS = ModelSettings()


def not_written(name: str, why: str) -> Problem:
    """Return the problem for a setting that is not written into prompts."""
    remedy = f"drop the record, or leave the key out by name: --ignore {name} (in a config: ignore: [{name}] of record)"
    return Problem("settings", f"the record has {name}, and {why}", remedy)


def reasoning_not_written(i: int, why: str, otherwise: str) -> Problem:
    """Return the problem for a message whose reasoning has no form.

    Args:
        i: The index of the message.
        why: What has no form for it.
        otherwise: What to use instead.
    """
    by_name = "--ignore messages.reasoning_content, or content.thinking for parts (in a config: ignore of record)"
    return Problem(
        "thinking", f"message {i} has reasoning, and {why}", f"{otherwise}, or leave the reasoning out by name: {by_name}"
    )


def check_effort(conversation: Conversation, effort: str | None, source: str) -> None:
    """Check that no turn that is trained on reasons although the prompt asks for none.

    Args:
        conversation: The conversation.
        effort: The reasoning effort that its prompts state; None if they state none.
        source: Where the effort is from, for a message.

    Raises:
        Problem: If a turn does.
    """
    if effort != "none":
        return
    for i, message in enumerate(conversation.messages):
        if reasoning_of(message) and is_trained_on(message):
            remedy = (
                "state the effort that fits: a column reasoning_effort (in a config: reasoning_effort of record, for all of its "
                "records), or leave the reasoning out by name: --ignore messages.reasoning_content, or content.thinking for parts"
            )
            raise Problem("effort", f"message {i} has reasoning, and {source} asks for none", remedy)
