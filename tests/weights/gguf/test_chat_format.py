"""Chat formats: their Jinja template renders what they spell, and a template is recognized by what it renders."""

from __future__ import annotations

import pytest

from moe_train.data.chat import sandbox
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.weights.gguf import chat_format

CONVERSATION = [
    *({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}),
    *({"role": "assistant", "content": "Because."}, {"role": "user", "content": "And now?"}),
]


@pytest.mark.parametrize("name", chat_format.CHAT_FORMATS)
def test_jinja_spells_a_format_and_is_recognised(name: str) -> None:
    chat = chat_format.CHAT_FORMATS[name]
    template = chat_format.jinja_template(chat)
    variables = {"messages": CONVERSATION, "add_generation_prompt": True, "bos_token": "<s>"}
    assert sandbox.render(template, [variables]) == ["<s>" + chat_format.render_chat(chat, CONVERSATION, ask=True)]


def test_the_quickstarts_format_is_recognised(tokenizer: HuggingFace) -> None:
    assert tokenizer.chat_template is not None
    assert (
        chat_format.recognize_format(tokenizer.chat_template, tokenizer)
        == chat_format.CHAT_FORMATS["mistral v1 to v3, system first"]
    )
    for name, chat in chat_format.CHAT_FORMATS.items():
        assert chat_format.recognize_format(chat_format.jinja_template(chat), tokenizer) == chat, name
    assert chat_format.recognize_format(tokenizer.chat_template.replace("[INST]", "[Q]"), tokenizer) is None
    assert chat_format.recognize_format("{{ raise_exception('no') }}", tokenizer) is None
