"""Chat templates of several kinds, conversations, and what becomes of them."""

from __future__ import annotations

from moe_train import config
from moe_train.data.chat.conversation_to_tokens import examples
from moe_train.data.chat.example import Example
from moe_train.data.records.conversation import normalise
from moe_train.data.records.normal_form import Conversation, Message
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral

CHATML = """\
{%- for message in messages %}
{{- '<s>' + message['role'] + '\n' + (message['content'] or '') + '</s>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<s>assistant\n' }}
{%- endif %}
"""
WITH_GENERATION = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + eos_token }}{%- endgeneration %}
    {%- else %}
        {{- '[INST]' + message['content'] + '[/INST]' }}
    {%- endif %}
{%- endfor %}
"""
LAST_USER = """\
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- ('(last)' if loop.last else '') + '[INST]' + message['content'] + '[/INST]' }}
    {%- else %}
        {{- message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
SINGLE = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "It is 5."}]
SEVERAL = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "The quick brown fox?"},
    {"role": "assistant", "content": "jumps over\n\nthe lazy dog"},
    {"role": "user", "content": "It is 5."},
    {"role": "assistant", "content": "naïve café 東京 "},
]
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}BODY{% else %}{{ '[INST]' + m.content + '[/INST]' }}{% endif %}"
    "{% endfor %}"
)
CALLS = (
    "{% if tools %}{{ tools|tojson }}{% endif %}{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ c.function.name + c.function.arguments|tojson + ' id ' + c.id }}{% endfor %}{{ eos_token }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% else %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% endif %}{% endfor %}"
)
QUESTION = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b c"}
TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def render(messages: list[Message], template: str | None, tokenizer: HuggingFace | Mistral) -> Example:
    conversation = normalise({"messages": messages}, config.ChatRecord(name="chat"))
    assert isinstance(conversation, Conversation)
    (example,) = examples(conversation, template, tokenizer)
    return example


def spans(rendered: Example, tokenizer: HuggingFace | Mistral, bears_loss: bool) -> list[str]:
    """The decoded stretches of tokens that do, or do not, bear loss."""
    stretches: list[list[int]] = []
    before = not bears_loss
    for token, mask in zip(rendered.tokens, rendered.loss_mask, strict=True):
        if mask == bears_loss:
            if before != bears_loss:
                stretches.append([])
            stretches[-1].append(token)
        before = mask
    return [tokenizer.decode(stretch, keep_special=True) for stretch in stretches]


def unmerged(merged: list[Example]) -> list[Example]:
    """An example for each turn, as the turns that share an example would have without the others."""
    separate = []
    for example in merged:
        assert example.merged is not None and example.loss_mask is not None
        previous = 0
        for end in example.merged.ends:
            mask = [False] * previous + example.loss_mask[previous:end]
            separate.append(Example(example.tokens[:end], mask))
            previous = end
    return separate
