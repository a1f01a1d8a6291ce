"""Convert conversations to tokens with a Hugging Face tokenizer.

The chat template renders the text (`renderings`), part of the text is trained on (`loss_mask`), and the tokenizer
encodes it (`text_to_ids`).
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence

from moe_train.data.chat import sandbox
from moe_train.data.chat.example import EXTEND_VOCAB, OTHER_TEMPLATE, Example, without_tools
from moe_train.data.chat.loss_mask import Answers, Steps, Text
from moe_train.data.chat.renderings import PLAIN_TEXT_MARKS, checked, request, text_or_raise, without_marks
from moe_train.data.chat.sandbox import Request
from moe_train.data.chat.served import checked_texts
from moe_train.data.chat.template_reasoning import check_reasoning_rendered, spelled
from moe_train.data.chat.text_to_ids import encode_texts
from moe_train.data.records.normal_form import Conversation, Message, texts_of
from moe_train.data.records.problem import Problem
from moe_train.data.tokenizers.huggingface import HuggingFace


def examples(conversations: Sequence[Conversation], template: str, tokenizer: HuggingFace) -> list[list[Example] | ValueError]:
    """Convert conversations to training examples; they are rendered and encoded together. With tools, call `check_has_tools` first.

    Returns:
        For each conversation one example, or with tools as few as its renderings and tokens allow; or a ValueError in one line, if
        the template rejects the conversation or its turns cannot be located.
    """
    rendered = _rendered([_texts(conversation, template, tokenizer) for conversation in conversations], template)
    all_texts: list[Text] = []
    for texts in rendered:
        if not isinstance(texts, ValueError):
            all_texts += texts
    try:
        encoded = iter(encode_texts(all_texts, tokenizer))
    except Problem:
        # The tokenizer refuses one of the texts; only its conversation is to have the problem.
        return [texts if isinstance(texts, ValueError) else _encoded_alone(texts, tokenizer) for texts in rendered]
    results: list[list[Example] | ValueError] = []
    for texts in rendered:
        if isinstance(texts, ValueError):
            results.append(texts)
        else:
            # A text gives one example, or several where its turns cannot share tokens.
            results.append(list(itertools.chain.from_iterable(itertools.islice(encoded, len(texts)))))
    return results


def _encoded_alone(texts: list[Text], tokenizer: HuggingFace) -> list[Example] | Problem:
    """Encode the texts of one conversation; return the problem if the tokenizer refuses one."""
    try:
        return list(itertools.chain.from_iterable(encode_texts(texts, tokenizer)))
    except Problem as problem:
        return problem


def prompt(conversation: Conversation, template: str, tokenizer: HuggingFace) -> list[int]:
    """Return the tokens up to where the assistant's next turn begins."""
    conversation = spelled(conversation, template, tokenizer)
    text = without_marks(_text(conversation, True, template, tokenizer))
    _check_system(conversation, _as_typed(text))
    return encode_texts([Text(text, [], [])], tokenizer)[0][0].tokens


def prompt_text(conversation: Conversation, template: str, tokenizer: HuggingFace) -> str:
    """Return the text up to where the assistant's next turn begins, in which control tokens stand by name."""
    conversation = spelled(conversation, template, tokenizer)
    return _as_typed(without_marks(_text(conversation, True, template, tokenizer)))


def _as_typed(text: str) -> str:
    """Return a rendering without the marks of what somebody has typed that looks like a control token."""
    return text.replace(PLAIN_TEXT_MARKS[0], "").replace(PLAIN_TEXT_MARKS[1], "")


def _check_system(conversation: Conversation, rendered: str) -> None:
    """Raise Problem if a template has left a system message out, as some do silently."""
    if conversation.messages[-1].get("role") != "user":
        return  # Mistral's formats write the system message into the last user turn, unless results of tools follow it
    for message in conversation.messages:
        if message.get("role") != "system":
            continue
        for written in texts_of(message):
            # Templates trim what they write.
            if written.strip() not in rendered:
                remedy = f"write its text into the first user message, or name a template that has a system turn {OTHER_TEMPLATE}"
                raise Problem("system", "the chat template leaves the system message out", remedy)


@functools.lru_cache(maxsize=8)
def check_has_tools(template: str, tokenizer: HuggingFace) -> None:
    """Check that a template can represent tools, by rendering a sample conversation.

    Raises:
        Problem: If the template omits tools, calls or results, or writes them with control tokens that the tokenizer lacks.
    """
    # Rare words, which a template hardly contains by itself, and an id of nine characters, as Mistral's formats require.
    function = {"name": "look_up", "description": "Look a word up.", "parameters": {"type": "object", "properties": {}}}
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "quokka"}'}}
    messages: list[Message] = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "name": "look_up", "content": "marsupial"},
        {"role": "assistant", "content": "It is small."},
    ]
    try:
        tools = [{"type": "function", "function": function}]
        text = _text(Conversation(messages, tools), False, template, tokenizer)
    except ValueError as error:
        raise without_tools(f"the chat template takes none ({error})", _tools_remedy(tokenizer)) from error
    for feature, sample in (("tools", "Look a word up."), ("calls", "quokka"), ("results", "marsupial")):
        if sample not in text:
            raise without_tools(f"the chat template leaves {feature} out", _tools_remedy(tokenizer))
    # Mistral's control tokens; to a tokenizer without them they would be letters.
    for token in re.findall(r"\[/?[A-Z_]+\]", text):
        if len(tokenizer.encode_control(token)) != 1:
            reason = f"the chat template writes {token}, which {tokenizer.files[0]} has no token for"
            raise without_tools(reason, _tools_remedy(tokenizer))


def _tools_remedy(tokenizer: HuggingFace) -> str:
    """Return the remedy for tools that the chat template cannot write."""
    remedy = f"name a template that writes tools {OTHER_TEMPLATE}, such as chatml where the tokenizer has <|im_start|>"
    # Only the vocabulary of Mistral's first version is contained in that of v3; its ▁ has this id, and Llama's another.
    if tokenizer.vocab_size == 32000 and tokenizer.token_id("▁") == 28705:
        remedy += f", or {EXTEND_VOCAB}"
    return f"{remedy}, or drop the record"


# --- rendering -------------------------------------------------------------------------------------------------


def _texts(conversation: Conversation, template: str, tokenizer: HuggingFace) -> Steps:
    """Find the texts that a conversation is trained on as, with its reasoning in the spelling that the template reads."""
    texts = yield from checked_texts(spelled(conversation, template, tokenizer), template, tokenizer)
    check_reasoning_rendered(conversation, texts)
    return texts


def _rendered(steps: list[Steps], template: str) -> list[list[Text] | ValueError]:
    """Run the generators of all conversations in lockstep, so that all their requests are sent to the sandbox at once.

    Returns:
        The texts of each conversation, or its error.
    """
    results: list[list[Text] | ValueError] = [[] for _ in steps]
    answered: list[tuple[int, Answers | None]] = [(i, None) for i in range(len(steps))]
    while answered:
        pending: list[tuple[int, list[Request]]] = []
        for i, answers in answered:
            try:
                # A generator has to be advanced to its first request before anything can be sent to it.
                pending.append((i, next(steps[i]) if answers is None else steps[i].send(answers)))
            except StopIteration as stop:
                results[i] = stop.value
            except ValueError as error:
                results[i] = error
        try:
            all_requests = itertools.chain.from_iterable(requests for _, requests in pending)
            texts = iter(sandbox.render_prefixes(template, list(all_requests)))
        except ValueError as error:  # the template itself is at fault
            for i, _ in pending:
                results[i] = error
            return results
        # The next round sends each generator its renderings; finished generators have left the list.
        answered = []
        for i, requests in pending:
            answered.append((i, [checked(next(texts), text_request) for text_request in requests]))
    return results


def _text(conversation: Conversation, prompt: bool, template: str, tokenizer: HuggingFace) -> str:
    """Render one conversation."""
    text_request = request(conversation, [(len(conversation.messages), prompt)], tokenizer)
    (text,) = checked(sandbox.render_prefixes(template, [text_request])[0], text_request)
    return text_or_raise(text)
