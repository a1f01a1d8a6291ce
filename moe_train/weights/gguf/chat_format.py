"""Chat formats that a few strings can describe: those around each turn. The text of a conversation, the Jinja template and the Go
template (Ollama's language) are all derived from this one description.

A Jinja template is recognized if it renders fixed conversations exactly as a format does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from moe_train.data.chat import sandbox
from moe_train.data.tokenizers.mistral import Mistral
from moe_train.data.tokenizers.tokenizer import Tokenizer


class ChatFormat(NamedTuple):
    """Texts before and after a turn. The token that begins the sequence is not part of it."""

    user: tuple[str, str]
    assistant: tuple[str, str]
    system: tuple[str, str] | Literal["first", "last"]
    """Texts around a system turn; or, with an empty line after it, where the system text goes: before the first or the last user
    turn's text.
    """

    @property
    def ask(self) -> str:
        """What prompts for an answer; a trailing space belongs to the answer's first token."""
        return self.assistant[0].rstrip(" ")

    @property
    def end(self) -> str:
        """What ends an answer."""
        return self.assistant[1].rstrip("\n")


def _inst_format(system: tuple[str, str] | Literal["first", "last"]) -> ChatFormat:
    return ChatFormat(("[INST]", "[/INST]"), ("", "</s>"), system)


CHAT_FORMATS = {
    "chatml": ChatFormat(
        ("<|im_start|>user\n", "<|im_end|>\n"),
        ("<|im_start|>assistant\n", "<|im_end|>\n"),
        ("<|im_start|>system\n", "<|im_end|>\n"),
    ),
    # for Mistral's formats, llama.cpp's sentencepiece itself adds the space after a control token
    "mistral v1": ChatFormat(("[INST] ", " [/INST]"), (" ", "</s>"), "first"),
    "mistral v1 to v3, system first": _inst_format("first"),
    "mistral v3": _inst_format("last"),
    "mistral v7": _inst_format(("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")),
}
"""The known formats by name."""
_FORMAT_OF_VERSION = {"v1": "mistral v1", "v2": "mistral v3", "v3": "mistral v3"}
"""mistral-common's tokenizer version -> format; later versions are like v7."""


def mistral_format(tokenizer: Mistral) -> ChatFormat:
    """Return the format that mistral-common writes for plain conversations; v7 and later are alike."""
    return CHAT_FORMATS[_FORMAT_OF_VERSION.get(tokenizer.finetuning.version.value, "mistral v7")]


# Conversations whose texts are all different, so that their order in a rendering is unambiguous.
_SYSTEM = ("system", "the rules")
_TURNS = (("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))
# With and without a system turn, and both with an answer at the end and with a question that prompts for one.
_PROBES = (_TURNS[:2], _TURNS[:3], _TURNS, (_SYSTEM, *_TURNS[:2]), (_SYSTEM, *_TURNS[:3]))


def recognize_format(template: str, tokenizer: Tokenizer) -> ChatFormat | None:
    """Return the format of a Jinja template for conversations of system, user and assistant; None if it is not known."""
    tokens = getattr(tokenizer, "named_tokens", {})
    conversations = [[{"role": role, "content": content} for role, content in probe] for probe in _PROBES]
    asks = [conversation[-1]["role"] == "user" for conversation in conversations]
    variables = [
        {**tokens, "messages": conversation, "add_generation_prompt": ask}
        for conversation, ask in zip(conversations, asks, strict=True)
    ]
    try:
        texts = sandbox.render(template, variables)
    except ValueError:
        return None  # the template rejects a conversation, for example a system turn; no known format does
    # `render` marks the spans that an assistant generates; the marks are no part of the text.
    for mark in sandbox.GENERATION:
        texts = [text.replace(mark, "") for text in texts]
    begin = tokens.get("bos_token", "")
    for chat in CHAT_FORMATS.values():
        expected_texts = [render_chat(chat, conversation, ask) for conversation, ask in zip(conversations, asks, strict=True)]
        if [text.removeprefix(begin) for text in texts] == expected_texts:
            return chat
    return None


def render_chat(chat: ChatFormat, messages: Sequence[Mapping[str, Any]], ask: bool = False) -> str:
    """Return the text of a conversation; with `ask`, followed by what prompts for the next answer."""
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    system = next((message["content"] for message in messages if message["role"] == "system"), None)
    text = ""
    for i, message in enumerate(messages):
        content = message["content"]
        match message["role"]:
            case "system":
                if isinstance(chat.system, tuple):
                    text += content.join(chat.system)
            case "user":
                system_turn = None  # index of the user turn that the system text precedes
                if isinstance(chat.system, str):
                    system_turn = {"first": users[0], "last": users[-1]}.get(chat.system)
                if system is not None and i == system_turn:
                    content = f"{system}\n\n{content}"
                text += content.join(chat.user)
            case role:
                assert role == "assistant", role
                text += content.join(chat.assistant)
    if ask:
        text += chat.ask
    return text


def jinja_template(chat: ChatFormat) -> str:
    """Return the Jinja template, including the beginning of the sequence; what it does not support (tools) raises an error."""
    content = "message['content']"
    refuse = "{{- raise_exception('supported roles are system, user and assistant') }}"
    user = f"{{{{- {_quoted(chat.user[0])} + {content} + {_quoted(chat.user[1])} }}}}"
    lines = ["{{- bos_token }}"]
    if isinstance(chat.system, tuple):
        system = f"{{{{- {_quoted(chat.system[0])} + {content} + {_quoted(chat.system[1])} }}}}"
        lines += ["{%- for message in messages %}"]
    else:
        system = ""
        condition = "loop.index0 == turns.first" if chat.system == "first" else "loop.index0 == turns.last"
        lines += [
            # A namespace, since what Jinja assigns within a loop is lost at the end of the iteration.
            "{%- set turns = namespace(first=none, last=none, system=none) %}",
            "{%- for message in messages %}",
            "{%- if message['role'] == 'system' %}{% set turns.system = message['content'] %}{% endif %}",
            "{%- if message['role'] == 'user' %}{% set turns.last = loop.index0 %}{% endif %}",
            "{%- if message['role'] == 'user' and turns.first is none %}{% set turns.first = loop.index0 %}{% endif %}",
            "{%- endfor %}",
            "{%- for message in messages %}",
        ]
        rules = f"(turns.system + '\\n\\n' if turns.system is not none and {condition} else '')"
        user = f"{{{{- {_quoted(chat.user[0])} + {rules} + {content} + {_quoted(chat.user[1])} }}}}"
    return "\n".join(
        [
            *lines,
            f"{{%- if message['role'] == 'system' %}}{system}",
            f"{{%- elif message['role'] == 'user' %}}{user}",
            "{%- elif message['role'] == 'assistant' and not message.get('tool_calls') %}"
            f"{{{{- {_quoted(chat.assistant[0])} + {content} + {_quoted(chat.assistant[1])} }}}}",
            f"{{%- else %}}{refuse}",
            "{%- endif %}",
            "{%- endfor %}",
            f"{{%- if add_generation_prompt %}}{{{{- {_quoted(chat.ask)} }}}}{{% endif %}}",
        ]
    )


def go_template(chat: ChatFormat) -> str:
    """Return the Go template, on one line, since line ends would count as text; an answer that is being continued has no end.

    .Messages includes the system turns, .System their text (https://docs.ollama.com/template).
    """
    # Go templates have no arithmetic: message i is the last one if the slice from i on has length 1.
    last = "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
    system = rules = first = ""
    if isinstance(chat.system, tuple):
        system = f'{{{{ if eq .Role "system" }}}}{_go(chat.system[0])}{{{{ .Content }}}}{_go(chat.system[1])}{{{{ end }}}}'
    else:  # the user turn to be answered is the last message
        condition = "$first" if chat.system == "first" else "$last"
        rules = f'{{{{ if and {condition} $.System }}}}{{{{ $.System }}}}{{{{ "\\n\\n" }}}}{{{{ end }}}}'
    if chat.system == "first":
        first = "{{ $first := true }}"
        # Part of a user turn's text, so that a system turn before it leaves $first as it is.
        rules += "{{ $first = false }}"
    return "".join(
        [
            first,
            "{{ range $i, $_ := .Messages }}",
            last,
            system,
            f'{{{{ if eq .Role "user" }}}}{_go(chat.user[0])}{rules}{{{{ .Content }}}}{_go(chat.user[1])}{{{{ end }}}}',
            f'{{{{ if eq .Role "assistant" }}}}{_go(chat.assistant[0])}{{{{ .Content }}}}',
            f"{{{{ if not $last }}}}{_go(chat.assistant[1])}{{{{ end }}}}{{{{ end }}}}",
            f'{{{{ if and $last (ne .Role "assistant") }}}}{_go(chat.ask)}{{{{ end }}}}' if chat.ask else "",
            "{{ end }}",
        ]
    )


def _quoted(text: str) -> str:
    """Return a string literal of Jinja and Go, whose escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False)


def _go(text: str) -> str:
    """Return the Go expression for a constant text; nothing for an empty one."""
    if not text:
        return ""
    return f"{{{{ {_quoted(text)} }}}}"
