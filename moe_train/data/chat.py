"""Conversations to tokens and a loss mask that covers the assistant's tokens, its end token included, and nothing else.

With a Hugging Face tokenizer the chat template is rendered as transformers does it (`apply_chat_template`): a sandboxed
jinja2 with the same options and variables. Its sandbox lets a template see the messages and the control tokens, no
files and no code. The clock (`strftime_now`) is left out: a record's tokens must not depend on the day.
With a Mistral tokenizer mistral-common renders and validates, and no template is involved.
"""

from __future__ import annotations

import bisect
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from pydantic import ValidationError

from moe_train.data.fields import brief, checked_text
from moe_train.data.tokenizer import HuggingFace, Mistral, Tokenizer

Message = dict[str, Any]

# Unicode noncharacters, which no text contains: what a user wrote that looks like a control token stands between the
# first pair, what a template marks with {% generation %} between the second.
_PLAIN = ("\ufdd0", "\ufdd1")
_GENERATION = ("\ufdd2", "\ufdd3")


class Rendered(NamedTuple):
    """One conversation: ids, and for each id whether predicting it bears loss."""

    tokens: list[int]
    loss_mask: list[bool]


def render(messages: Sequence[Message], template: str | None, tokenizer: Tokenizer) -> Rendered:
    """Tokens and loss mask of a conversation; an assistant message of `weight` 0 bears no loss.

    Raises ValueError (one line, without file and line number: the caller knows them) for messages out of form, for
    tools, for a template that fails or whose assistant turns cannot be told apart, and for an empty mask.
    """
    messages = _checked(messages)
    match tokenizer:
        case Mistral():
            rendered = _render_mistral(messages, tokenizer)
        case HuggingFace():
            rendered = _render_template(messages, _needed(template), tokenizer)
        case _:
            raise TypeError(f"no chat format for a {type(tokenizer).__name__}")
    if not any(rendered.loss_mask[1:]):
        raise ValueError("no token would bear loss: the conversation has no assistant text (or only of weight 0)")
    return rendered


def render_prompt(messages: Sequence[Message], template: str | None, tokenizer: Tokenizer) -> list[int]:
    """Tokens of a conversation up to where the assistant's next turn begins."""
    messages = _checked(messages)
    match tokenizer:
        case Mistral():
            return _encode_mistral(messages, tokenizer, prompt=True)
        case HuggingFace():
            text = _template_text(messages, _needed(template), tokenizer, add_generation_prompt=True)
            return _encode_template(_without(text, _GENERATION), [], tokenizer).tokens
        case _:
            raise TypeError(f"no chat format for a {type(tokenizer).__name__}")


def load_template(setting: str | None, tokenizer: Tokenizer) -> str | None:
    """The chat template that `data.chat_template` states (a file, or the text itself), else the tokenizer's own."""
    if setting is None:
        return tokenizer.chat_template
    if isinstance(tokenizer, Mistral):
        raise ValueError("data.chat_template has no effect with a mistral tokenizer, whose format is fixed; leave it out")
    if "{{" in setting or "{%" in setting:
        return setting
    if not Path(setting).is_file():
        raise FileNotFoundError(f"data.chat_template: no file {setting}; give a jinja file or the template's text")
    return Path(setting).read_text(encoding="utf-8")


def _needed(template: str | None) -> str:
    if template is None:
        raise ValueError("the tokenizer has no chat template; set data.chat_template to a jinja file")
    return template


def _checked(messages: Sequence[Message]) -> list[Message]:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"messages should be a list with at least one message, not {brief(messages)}")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"message {i} should be an object with role and content, not {brief(message)}")
        message = {key: value for key, value in message.items() if value is not None}  # columnar files fill in nulls
        if message.get("role") == "tool" or message.get("tool_calls") or message.get("tool_call_id"):
            raise ValueError(
                f"message {i} uses tools, which are not trained on yet: their turns have no loss mask; drop such records"
            )
        if message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"message {i} has role {brief(message.get('role'))}; roles are system, user, assistant")
        checked_text(message.get("content"), f"the content of message {i}")
        if any(mark in value for mark in _PLAIN + _GENERATION for value in message.values() if isinstance(value, str)):
            raise ValueError(f"message {i} contains a Unicode noncharacter (U+FDD0 to U+FDD3); remove it")
        if message.get("weight", 1) not in (0, 1):
            raise ValueError(f"message {i} has weight {brief(message['weight'])}; a weight is 0 (no loss) or 1")
        checked.append({key: value for key, value in message.items() if key != "tool_calls"})
    return checked


def _bears_loss(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("weight", 1) == 1


# --- chat templates --------------------------------------------------------------------------------------------


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`: transformers' mark of what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own spelling)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return _GENERATION[0] + caller() + _GENERATION[1]


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """jinja2's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template cannot be read: {error}") from error


def _template_text(messages: list[Message], template: str, tokenizer: HuggingFace, *, add_generation_prompt: bool) -> str:
    """The template's output, with both kinds of marks in it."""
    looks_special = _special_pattern(tokenizer.special_tokens)

    def marked(key: str, value: Any) -> Any:
        plain = key != "role" and isinstance(value, str)
        return looks_special.sub(rf"{_PLAIN[0]}\g<0>{_PLAIN[1]}", value) if plain else value

    turns = [{key: marked(key, value) for key, value in message.items() if key != "weight"} for message in messages]
    try:
        return _compile(template).render(
            messages=turns, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **tokenizer.named_tokens
        )
    except Exception as error:  # a template is a program: it can fail in any way
        raise ValueError(f"the chat template refuses the record: {str(error) or type(error).__name__}") from error


@functools.lru_cache(maxsize=8)
def _special_pattern(special_tokens: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _without(text: str, marks: tuple[str, str]) -> str:
    return text.replace(marks[0], "").replace(marks[1], "")


def _render_template(messages: list[Message], template: str, tokenizer: HuggingFace) -> Rendered:
    text = _template_text(messages, template, tokenizer, add_generation_prompt=False)
    marked = _GENERATION[0] in text
    spans = _generation_spans(text, messages) if marked else _prefix_spans(text, messages, template, tokenizer)
    return _encode_template(_without(text, _GENERATION), spans, tokenizer)


def _generation_spans(text: str, messages: list[Message]) -> list[tuple[int, int]]:
    """Characters (start, end) between the marks, in `text` without the marks."""
    pieces = re.split("[" + "".join(_GENERATION) + "]", text)
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    spans = [(ends[i], ends[i + 1]) for i in range(1, len(pieces), 2)]
    turns = [message for message in messages if message["role"] == "assistant"]
    if all(_bears_loss(turn) for turn in turns):
        return spans
    if len(spans) != len(turns):
        raise ValueError(
            f"the chat template marks {len(spans)} generations for {len(turns)} assistant turns; weights need one each"
        )
    return [span for span, turn in zip(spans, turns, strict=True) if _bears_loss(turn)]


def _prefix_spans(text: str, messages: list[Message], template: str, tokenizer: HuggingFace) -> list[tuple[int, int]]:
    """Characters (start, end) that each assistant turn adds to the rendering of the turns before it."""
    spans = []
    for i, message in enumerate(messages):
        if not _bears_loss(message):
            continue
        before = _template_text(messages[:i], template, tokenizer, add_generation_prompt=True)
        through = _template_text(messages[: i + 1], template, tokenizer, add_generation_prompt=False)
        if not (text.startswith(through) and through.startswith(before)):
            raise ValueError(
                f"the chat template renders the turns before message {i} differently once it is there, so its tokens cannot "
                "be told apart; put {% generation %} … {% endgeneration %} around the assistant's part of the template"
            )
        turn = through[len(before) :]
        stripped = turn.rstrip()
        # What follows the end token up to the next turn (ChatML's newline) is never generated.
        if any(stripped.endswith(token) for token in tokenizer.special_tokens):
            turn = stripped
        spans.append((len(before), len(before) + len(turn)))
    return spans


def _encode_template(text: str, spans: list[tuple[int, int]], tokenizer: HuggingFace) -> Rendered:
    """Ids of `text`; those that touch a span bear loss. What stands between plain marks is encoded as plain text."""
    tokens: list[int] = []
    mask: list[bool] = []
    position = 0
    for i, piece in enumerate(re.split("[" + "".join(_PLAIN) + "]", text)):
        if i % 2:
            ids = tokenizer.encode(piece)
            offsets = [(0, len(piece))] * len(ids)
        else:
            ids, offsets = tokenizer.encode_control(piece)
        bears_loss = [False] * len(ids)
        for start, end in spans:
            # From the first token that ends after the span's start (one without characters of its own counts as one
            # character long) to the first that starts at its end or later.
            first = bisect.bisect_right(offsets, start - position, key=lambda offset: max(offset[1], offset[0] + 1))
            last = bisect.bisect_left(offsets, end - position, key=lambda offset: offset[0])
            bears_loss[first:last] = [True] * (last - first)
        tokens += ids
        mask += bears_loss
        position += len(piece) + 1  # the mark
    return Rendered(tokens, mask)


# --- mistral-common --------------------------------------------------------------------------------------------


def _encode_mistral(messages: list[Message], tokenizer: Mistral, *, prompt: bool) -> list[int]:
    from mistral_common.exceptions import MistralCommonException
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    encoder = tokenizer.prompting if prompt else tokenizer.finetuning
    try:
        return encoder.encode_chat_completion(ChatCompletionRequest.model_validate({"messages": plain})).tokens
    except ValidationError as error:
        raise ValueError(f"mistral-common refuses the record: {error.errors()[0]['msg']}") from error
    except (MistralCommonException, NotImplementedError, AssertionError) as error:
        raise ValueError(f"mistral-common refuses the record: {error}") from error


def _render_mistral(messages: list[Message], tokenizer: Mistral) -> Rendered:
    """In every version an assistant turn ends with EOS, and nothing else holds EOS: count back from each."""
    from mistral_common.protocol.instruct.messages import AssistantMessage
    from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase

    tokens = _encode_mistral(messages, tokenizer, prompt=False)
    mask = [False] * len(tokens)
    ends = [i + 1 for i, token in enumerate(tokens) if token == tokenizer.eos_id]
    turns = [message for message in messages if message["role"] == "assistant"]
    if len(ends) != len(turns):
        raise ValueError("mistral-common joins consecutive assistant messages; make them one message")
    encoder = tokenizer.finetuning.instruct_tokenizer
    assert isinstance(encoder, InstructTokenizerBase)
    for end, message in zip(ends, turns, strict=True):
        own = encoder.encode_assistant_message(AssistantMessage(content=message["content"]), False)
        if tokens[end - len(own) : end] != own:
            raise ValueError(f"the assistant's tokens are not where mistral-common put its turn ({brief(message['content'])})")
        if _bears_loss(message):
            mask[end - len(own) : end] = [True] * len(own)
    return Rendered(tokens, mask)
