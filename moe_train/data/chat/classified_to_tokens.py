"""Convert texts and conversations with labels to examples of one segment, at whose last token a head reads its scores."""

from __future__ import annotations

from moe_train.data.chat import conversation_to_tokens
from moe_train.data.chat.example import Example
from moe_train.data.records.normal_form import ClassifiedText, Conversation
from moe_train.data.records.problem import Problem
from moe_train.data.tokenizers.tokenizer import Tokenizer


def classified_example(record: ClassifiedText, template: str | None, tokenizer: Tokenizer) -> Example:
    """Return the example of a record. `Example.values` are its labels, and the loss mask covers its last token alone.

    Raises:
        ValueError: the record has no text, or the conversation cannot be rendered.
    """
    tokens = scored_tokens(record.content, template, tokenizer)
    return Example(tokens, [False] * (len(tokens) - 1) + [True], values=record.labels)


def scored_tokens(content: str | Conversation, template: str | None, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that a head reads.

    A text has the token that begins a document and none that ends it, as transformers' tokenizers encode it. A conversation is
    rendered as a whole; if it does not end with the assistant's turn, then up to where that would begin.
    """
    if isinstance(content, str):
        ids = tokenizer.encode(content)
        if not ids:
            raise Problem("empty", "the text is empty", "drop the record")
        return ids if tokenizer.bos_id is None else [tokenizer.bos_id, *ids]
    if content.messages[-1]["role"] != "assistant":
        return conversation_to_tokens.render_prompt(content.messages, template, tokenizer, content.tools)
    examples = conversation_to_tokens.examples(content, template, tokenizer)
    if len(examples) > 1:
        message = "the chat format writes earlier turns of this conversation differently later"
        raise Problem("turns", message, "score its turns one by one")
    return examples[0].tokens
