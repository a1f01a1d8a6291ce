# ruff: noqa: E501 (templates)
"""Chat templates built like those of well-known model families, each with a small tokenizer that has their control tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import tokenizers

from moe_train.data.tokenizers.huggingface import HuggingFace


class Family(NamedTuple):
    """A chat format: its template, control tokens, and what it can express."""

    template: str
    specials: tuple[str, ...]
    bos: str | None
    eos: str
    end: str
    """What ends a turn."""
    tools: bool = False
    system: bool = True


SPLIT = (
    "{%- if messages[0].role == 'system' %}{%- set system, turns = messages[0].content, messages[1:] %}"
    "{%- else %}{%- set system, turns = '', messages %}{%- endif %}"
)
LLAMA_2 = SPLIT + (
    "{%- for m in turns %}{%- if m.role == 'user' %}"
    "{{- bos_token + '[INST] ' + ('<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system else '') }}"
    "{{- m.content|trim + ' [/INST]' }}{%- else %}{{- ' ' + m.content|trim + ' ' + eos_token }}{%- endif %}{%- endfor %}"
)
LLAMA_3 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    + SPLIT
    + "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + system|trim + '<|eot_id|>' }}"
    "{%- for m in turns %}{%- if m.tool_calls %}{%- if m.tool_calls|length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}"
    "{%- set f = m.tool_calls[0].function %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{{- '{\"name\": \"' + f.name + '\", \"parameters\": ' }}{{- f.arguments|tojson + '}<|eot_id|>' }}"
    "{%- elif m.role == 'tool' %}{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content|tojson + '<|eot_id|>' }}"
    "{%- else %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{%- if tools and loop.first %}{{- 'Functions:\n' }}{%- for t in tools %}{{- t|tojson(indent=4) + '\n\n' }}{%- endfor %}{%- endif %}"
    "{{- m.content|trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
QWEN = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- else %}"
    "{{- 'Be helpful.' }}{%- endif %}{{- '\n\n# Tools' }}{%- for tool in tools %}{{- '\n' }}{{- tool|tojson }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{%- endif %}{%- for m in messages %}"
    "{%- if m.role == 'user' or (m.role == 'system' and not loop.first) or (m.role == 'assistant' and not m.tool_calls) %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{%- elif m.role == 'assistant' %}"
    "{{- '<|im_start|>' + m.role }}{%- if m.content %}{{- '\n' + m.content }}{%- endif %}{%- for c in m.tool_calls %}"
    '{{- \'\n<tool_call>\n{"name": "\' }}{{- c.function.name }}{{- \'", "arguments": \' }}{{- c.function.arguments|tojson }}'
    "{{- '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}{%- elif m.role == 'tool' %}"
    "{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\n<tool_response>\n' }}{{- m.content }}{{- '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
ZEPHYR = (
    "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + eos_token }}\n{% elif m['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + m['content'] + eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n"
    "{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
DEEPSEEK = (
    "{% set ns = namespace(system='') %}{%- for m in messages %}{%- if m['role'] == 'system' %}"
    "{%- set ns.system = ns.system + m['content'] %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system }}"
    "{%- if tools %}{{ '\n' + tools|tojson }}{%- endif %}"
    "{%- for m in messages %}{%- if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] + '<｜Assistant｜>' }}{%- endif %}"
    "{%- if m['role'] == 'assistant' %}{{ m['content'] or '' }}{%- for c in m.tool_calls or [] %}"
    "{{ '<｜tool▁call▁begin｜>' + c.function.name + '\n' + c.function.arguments|tojson + '<｜tool▁call▁end｜>' }}{%- endfor %}"
    "{{ '<｜end▁of▁sentence｜>' }}{%- endif %}{%- if m['role'] == 'tool' %}"
    "{{ '<｜tool▁output▁begin｜>' + m['content'] + '<｜tool▁output▁end｜>' }}{%- endif %}{%- endfor %}"
)
COMMAND_R = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + m['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}{% else %}"
    "{{ '<|START_OF_TURN_TOKEN|><|' + m['role']|upper + '_TOKEN|>' + m['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
MISTRAL_V3 = (  # as for v0.3 and Nemo, but with the text beside calls
    "{%- if messages[0].role == 'system' %}{%- set system_message = messages[0].content %}{%- set loop_messages = messages[1:] %}"
    "{%- else %}{%- set loop_messages = messages %}{%- endif %}{%- if not tools is defined %}{%- set tools = none %}{%- endif %}"
    "{%- set user_messages = loop_messages | selectattr('role', 'equalto', 'user') | list %}{%- set ns = namespace(index=0) %}"
    "{%- for m in loop_messages %}{%- if not (m.role == 'tool' or (m.tool_calls is defined and m.tool_calls is not none)) %}"
    "{%- if (m['role'] == 'user') != (ns.index % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}"
    "{%- set ns.index = ns.index + 1 %}{%- endif %}{%- endfor %}{{- bos_token }}{%- for m in loop_messages %}"
    "{%- if m['role'] == 'user' %}{%- if tools is not none and (m == user_messages[-1]) %}{{- '[AVAILABLE_TOOLS]' }}"
    "{{- tools|tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}{%- if loop.last and system_message is defined %}"
    "{{- '[INST]' + system_message + '\n\n' + m['content'] + '[/INST]' }}{%- else %}{{- '[INST]' + m['content'] + '[/INST]' }}"
    "{%- endif %}{%- elif m.tool_calls is defined and m.tool_calls is not none %}{{- (m.content or '') + '[TOOL_CALLS][' }}"
    "{%- for c in m.tool_calls %}{%- set out = c.function|tojson %}{{- out[:-1] }}"
    "{%- if c.id is not defined or c.id|length != 9 %}{{- raise_exception('ids have 9 characters') }}{%- endif %}"
    "{{- ', \"id\": \"' + c.id + '\"}' }}{%- if not loop.last %}{{- ', ' }}{%- else %}{{- ']' + eos_token }}{%- endif %}{%- endfor %}"
    "{%- elif m['role'] == 'assistant' %}{{- m['content'] + eos_token }}{%- elif m['role'] == 'tool' %}"
    "{{- '[TOOL_RESULTS]{\"content\": ' + m.content|tojson + ', \"call_id\": \"' + m.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
    "{%- endif %}{%- endfor %}"
)
MISTRAL_SMALL = (
    "{%- set today = strftime_now('%Y-%m-%d') %}{%- set default_system_message = 'The current date is ' + today + '.' %}{{- bos_token }}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}"
    "{%- else %}{%- set system_message = default_system_message %}{%- set loop_messages = messages %}{%- endif %}"
    "{{- '[SYSTEM_PROMPT]' + system_message + '[/SYSTEM_PROMPT]' }}{%- for m in loop_messages %}{%- if m['role'] == 'user' %}"
    "{{- '[INST]' + m['content'] + '[/INST]' }}{%- elif m['role'] == 'assistant' %}{{- m['content'] + eos_token }}"
    "{%- else %}{{- raise_exception('Only user, system and assistant roles are supported!') }}{%- endif %}{%- endfor %}"
)
_HEADERS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_DEEPSEEK = tuple(
    f"<｜{n}｜>" for n in "User Assistant end▁of▁sentence tool▁call▁begin tool▁call▁end tool▁output▁begin tool▁output▁end".split()
)
_COHERE = tuple(f"<|{n}_TOKEN|>" for n in "START_OF_TURN END_OF_TURN USER CHATBOT SYSTEM".split())
_TOOLS = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")

FAMILIES = {
    "llama-2": Family(LLAMA_2, ("<s>", "</s>"), "<s>", "</s>", "</s>"),
    "llama-3": Family(LLAMA_3, _HEADERS, "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", tools=True),
    "qwen": Family(QWEN, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None, "<|im_end|>", "<|im_end|>", tools=True),
    "zephyr": Family(ZEPHYR, ("<s>", "</s>"), "<s>", "</s>", "</s>"),
    "gemma": Family(GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>", "<end_of_turn>", system=False),
    "phi": Family(PHI, ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"), None, "<|endoftext|>", "<|end|>"),
    "deepseek": Family(DEEPSEEK, ("<s>", *_DEEPSEEK), "<s>", "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>", tools=True),
    "command-r": Family(COMMAND_R, ("<s>", *_COHERE), "<s>", "<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    "mistral-v3": Family(MISTRAL_V3, ("<s>", "</s>", "[INST]", "[/INST]", *_TOOLS), "<s>", "</s>", "</s>", tools=True),
    "mistral-small": Family(
        MISTRAL_SMALL, ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), "<s>", "</s>", "</s>"
    ),
}


def write_family(directory: Path, family: Family, base: HuggingFace) -> HuggingFace:
    """The family's files, with the vocabulary of `base`, whose control tokens become ordinary ones."""
    directory.mkdir(parents=True, exist_ok=True)
    content = json.loads(base.files[0].read_text())
    content["post_processor"] = None
    content["added_tokens"] = []
    for token in list(content["model"]["vocab"]):
        if token in base.special_tokens:
            content["model"]["vocab"][f"unused {token}"] = content["model"]["vocab"].pop(token)
    made = tokenizers.Tokenizer.from_str(json.dumps(content))
    made.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in family.specials])
    made.save(str(directory / "tokenizer.json"))
    named = {"bos_token": family.bos, "eos_token": family.eos}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **{key: token for key, token in named.items() if token}}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "chat_template.jinja").write_text(family.template)
    if family.end != family.eos:
        ids = [made.token_to_id(family.eos), made.token_to_id(family.end)]
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return HuggingFace(directory)
