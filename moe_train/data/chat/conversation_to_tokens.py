"""Convert conversations to tokens and a loss mask that covers the assistant's tokens, end token included, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_train import config
from moe_train.data.chat import template as templates
from moe_train.data.chat import template_reasoning
from moe_train.data.chat.example import OTHER_TEMPLATE, Example, RenderedPrompt, uses_tools
from moe_train.data.chat.template_pictures import check_pictures, example_with_pictures, with_pictures, without_files
from moe_train.data.records.media import shows_media
from moe_train.data.records.normal_form import Conversation, Message, ModelSettings, reasoning_of, texts_of
from moe_train.data.records.problem import Problem, brief, checked_text
from moe_train.data.records.settings import default_settings
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral
from moe_train.data.tokenizers.tokenizer import Tokenizer


def examples(conversation: Conversation, template: str | None, tokenizer: Tokenizer) -> list[Example]:
    """Convert a conversation to training examples.

    Args:
        conversation: The conversation.
        template: The chat template; None for a Mistral tokenizer.
        tokenizer: The tokenizer.

    Returns:
        One example; for a conversation with tools, as few as its tokens allow.

    Raises:
        ValueError: If a message is malformed, the tokenizer or template has no tools but the conversation does, the template
            fails, the assistant's turns cannot be located, or nothing would be trained on. The message is one line without
            file and line number, which the caller knows.
    """
    (result,) = examples_batch([conversation], template, tokenizer)
    if isinstance(result, ValueError):
        raise result
    return result


def examples_batch(
    conversations: Sequence[Conversation], template: str | None, tokenizer: Tokenizer
) -> list[list[Example] | ValueError]:
    """Return `examples` of each conversation, or the ValueError that it raises."""
    results: list[list[Example] | ValueError] = []
    for conversation in conversations:
        # An empty list holds the place of an accepted conversation until it is converted.
        results.append(_refused(conversation, template, tokenizer) or [])
    accepted = [i for i, refused in enumerate(results) if not refused]
    converted: list[list[Example] | ValueError] = []
    if accepted:  # without conversations no template is needed
        converted = _convert([conversations[i] for i in accepted], template, tokenizer)
    for i, record_examples in zip(accepted, converted, strict=True):
        if not isinstance(record_examples, ValueError) and not any(_has_trained_token(example) for example in record_examples):
            message = "no token would bear loss: the conversation has no assistant text (or only of weight 0)"
            record_examples = Problem("no-loss", message, "drop the record")
        results[i] = record_examples
    return results


def _has_trained_token(example: Example) -> bool:
    """Return whether any id after the first, which is never predicted, is trained on."""
    return True in (example.loss_mask or [])[1:]


def _refused(conversation: Conversation, template: str | None, tokenizer: Tokenizer) -> ValueError | None:
    """Return the reason why a conversation cannot be used; None if there is none."""
    try:
        _check(conversation)
        if conversation.messages and conversation.messages[-1]["role"] != "assistant":
            message = f"the last message is {conversation.messages[-1]['role']}, so nothing answers it"
            raise Problem("last-turn", message, "end with an assistant turn: there is nothing else to learn")
        if isinstance(tokenizer, HuggingFace):
            _needed(template, tokenizer)
            check_pictures(conversation, tokenizer)
        if uses_tools(conversation):
            check_has_tools(template, tokenizer)
    except ValueError as error:
        return error
    return None


def _convert(conversations: list[Conversation], template: str | None, tokenizer: Tokenizer) -> list[list[Example] | ValueError]:
    """Render and encode conversations that have been checked."""
    match tokenizer:
        case Mistral():
            from moe_train.data.chat import mistral  # importing it takes half a second

            results: list[list[Example] | ValueError] = []
            for conversation in conversations:
                try:
                    results.append(mistral.examples(conversation, tokenizer))
                except ValueError as error:
                    results.append(error)
            return results
        case HuggingFace():
            plain = [without_files(conversation) for conversation in conversations]
            rendered = templates.examples(plain, _needed(template, tokenizer), tokenizer)
            return [_with_pictures(x, own, tokenizer) for x, own in zip(rendered, conversations, strict=True)]
        case _:
            raise TypeError(f"no chat format for a {type(tokenizer).__name__}")


def _with_pictures(
    rendered: list[Example] | ValueError, conversation: Conversation, tokenizer: HuggingFace
) -> list[Example] | ValueError:
    """Return the examples of a conversation with the tokens of its pictures, or the error of one that cannot be used."""
    rules = tokenizer.media
    if isinstance(rendered, ValueError) or rules is None or not shows_media(conversation):
        return rendered
    try:
        return [example_with_pictures(example, conversation, rules) for example in rendered]
    except Problem as problem:
        return problem


def render_prompt(
    messages: list[Message],
    template: str | None,
    tokenizer: Tokenizer,
    tools: Sequence[dict[str, Any]] = (),
    reasoning_effort: str | None = None,
) -> list[int]:
    """Return the tokens of a conversation without pictures and sound; otherwise like `rendered_prompt`."""
    rendered = rendered_prompt(messages, template, tokenizer, tools, reasoning_effort)
    if rendered.media:
        raise Problem("picture", "the conversation has pictures or sound, which are not shown to the model here", "leave them out")
    return rendered.tokens


def rendered_prompt(
    messages: list[Message],
    template: str | None,
    tokenizer: Tokenizer,
    tools: Sequence[dict[str, Any]] = (),
    reasoning_effort: str | None = None,
) -> RenderedPrompt:
    """Render a conversation up to where the assistant's next turn begins.

    Args:
        messages: The messages.
        template: The chat template; None for a Mistral tokenizer.
        tokenizer: The tokenizer.
        tools: The tools that the assistant may call.
        reasoning_effort: How long the model may think; None for the default of the tokenizer or template.
    """
    conversation = Conversation(messages, list(tools), ModelSettings(reasoning_effort=reasoning_effort))
    if tools:
        check_has_tools(template, tokenizer)
    _check(conversation)
    match tokenizer:
        case Mistral():
            from moe_train.data.chat import mistral

            return mistral.prompt(conversation, tokenizer)
        case HuggingFace():
            check_pictures(conversation, tokenizer)
            tokens = templates.prompt(without_files(conversation), _needed(template, tokenizer), tokenizer)
            if tokenizer.media is None or not shows_media(conversation):
                return RenderedPrompt(tokens)
            pictures = with_pictures(tokens, [False] * len(tokens), messages, tokenizer.media)
            return RenderedPrompt(pictures.tokens, pictures.media)
        case _:
            raise TypeError(f"no chat format for a {type(tokenizer).__name__}")


def check_has_tools(template: str | None, tokenizer: Tokenizer) -> None:
    """Raise Problem if records with tools cannot be written with this tokenizer and template."""
    match tokenizer:
        case Mistral():
            from moe_train.data.chat import mistral

            mistral.check_has_tools(tokenizer)
        case HuggingFace():
            templates.check_has_tools(_needed(template, tokenizer), tokenizer)
        case _:
            raise TypeError(f"no chat format for a {type(tokenizer).__name__}")


def check_section(record: config.Record, template: str | None, tokenizer: Tokenizer) -> None:
    """Raise ValueError if a record section states settings that are not written with this tokenizer and template."""
    if not isinstance(record, config.ConversationRecord):
        return
    settings = default_settings(record)
    try:
        check_settings(settings, template, tokenizer)
    except Problem as problem:
        names = " and ".join(f"{name}: {value}" for name, value in settings._asdict().items() if value is not None)
        # The problem is worded for a record of a file; here the section `record` of the config states the setting.
        message = problem.message.replace("the record has", "record has")
        raise ValueError(f"data: the record section states {names}: {message}; leave it out of the section") from problem


def check_effort_option(effort: str | None, template: str | None, tokenizer: Tokenizer) -> None:
    """Raise ValueError if the option --reasoning-effort states an effort that is not written with this tokenizer and template."""
    try:
        check_settings(ModelSettings(reasoning_effort=effort), template, tokenizer)
    except Problem as problem:
        message = problem.message.replace("the record has reasoning_effort, and ", "")
        raise ValueError(f"--reasoning-effort {effort}: {message}; leave it out, or state one that is written") from problem


def check_settings(settings: ModelSettings, template: str | None, tokenizer: Tokenizer) -> None:
    """Raise Problem if settings are not written with this tokenizer and template."""
    if settings == ModelSettings():
        return
    match tokenizer:
        case Mistral():
            from moe_train.data.chat import mistral_settings

            mistral_settings.check_settings(settings, tokenizer)
        case HuggingFace():
            template_reasoning.check_settings(settings, _needed(template, tokenizer), tokenizer)
        case _:
            raise TypeError(f"no chat format for a {type(tokenizer).__name__}")


def load_template(setting: str | None, tokenizer: Tokenizer) -> str | None:
    """Return the chat template's text.

    Args:
        setting: The value of `data.chat_template`: a file, the text itself, or the name of a template that comes with this package;
            None for the tokenizer's own template.
        tokenizer: The tokenizer.

    Returns:
        The text; None if there is no template.

    Raises:
        ValueError: If a template is stated for a Mistral tokenizer, whose format is fixed.
    """
    if setting is None:
        return tokenizer.chat_template
    if isinstance(tokenizer, Mistral):
        raise ValueError("data.chat_template has no effect with a mistral tokenizer, whose format is fixed; leave it out")
    return read_template(setting)


def read_template(setting: str) -> str:
    """Return a template's text, given the text itself, the name of a file, or the name of a template of this package (chatml).

    Raises:
        FileNotFoundError: If there is no such file.
    """
    # A file name is taken to contain no jinja delimiter.
    if "{{" in setting or "{%" in setting:
        return setting
    file = _PACKAGED.get(setting, Path(setting))
    if not file.is_file():
        names = ", ".join(_PACKAGED)
        raise FileNotFoundError(f"data.chat_template: no file {setting}; give a jinja file, the template's text, or one of {names}")
    return file.read_text(encoding="utf-8")


_PACKAGED = {"chatml": Path(__file__).parent / "templates" / "chatml_tools.jinja"}
"""The templates of this package by the name under which a config selects them."""


def _needed(template: str | None, tokenizer: HuggingFace) -> str:
    """Return the template; raise Problem if there is none."""
    if template is None:
        message = f"the record is a conversation, and the tokenizer {tokenizer.files[0]} has no chat template"
        raise Problem("no-template", message, f"name a jinja file {OTHER_TEMPLATE}")
    return template


def _check(conversation: Conversation) -> None:
    """Check only for what would otherwise be trained on wrongly, or fail deep inside a library; `rules` checks the rest."""
    for i, message in enumerate(conversation.messages):
        role = message.get("role")
        content = message.get("content")
        # ASCII text cannot contain half a surrogate pair, and two keys leave no room for a weight or calls.
        if len(message) == 2 and role in ("user", "assistant") and content.__class__ is str and content.isascii():
            continue  # the fast path for almost all messages
        if role not in ("system", "user", "assistant", "tool"):
            raise Problem("role", f"message {i} has role {brief(role)}", "roles are system, user, assistant, tool")
        if isinstance(content, list):
            for text in (*texts_of(message), *reasoning_of(message)):
                checked_text(text, f"the content of message {i}")
        # A message with calls may leave its content out; any other must have one.
        elif "content" in message or "tool_calls" not in message:
            checked_text(content, f"the content of message {i}")
        if message.get("weight", 1) not in (0, 1):
            raise Problem("weight", f"message {i} has weight {brief(message['weight'])}", "a weight is 0 (no loss) or 1")
        calls = message.get("tool_calls", [])
        if calls and role != "assistant":
            raise Problem("call-role", f"message {i} has role {brief(role)}, and tool_calls", "only the assistant calls tools")
        for call in calls if isinstance(calls, list) else [calls]:
            if not _is_function(call) or not isinstance(call.get("id", ""), str):
                raise Problem("type", f"a call in message {i} is {brief(call)}", "write {id, function: {name, arguments}}")
        if not isinstance(message.get("tool_call_id", ""), str):
            raise Problem("type", f"tool_call_id of message {i} is {brief(message['tool_call_id'])}", "write it as a string")
    for i, tool in enumerate(conversation.tools):
        if not _is_function(tool):
            raise Problem("type", f"tool {i} is {brief(tool)}", "write {type, function: {name, description, parameters}}")


def _is_function(value: object) -> bool:
    """Return whether a tool or call has a function with a name."""
    function = value.get("function") if isinstance(value, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)
