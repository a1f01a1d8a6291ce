"""What a template leaves out is named, wherever it is, and JSON may be written anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_train.data.chat import conversation_to_tokens
from moe_train.data.chat.completeness import Rendering, check_complete
from moe_train.data.chat.rendered_checks import check_rendered
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.problem import Problem
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.chat.chats import ANSWER, CALL, CALLS, CHATML, MARKED, QUESTION, TOOL
from tests.data.chat.families import FAMILIES, write_family

SYSTEM = {"role": "system", "content": "Speak French."}
LOOKED_UP = CALL | {"function": {"name": "f", "arguments": '{"word": "quokka", "n": 7}'}}
CALLING = {"role": "assistant", "content": "I look it up.", "tool_calls": [LOOKED_UP]}
RESULT = {"role": "tool", "tool_call_id": CALL["id"], "name": "f", "content": '{"kind": "marsupial"}'}
LATER = [{"role": "user", "content": "d"}, {"role": "assistant", "content": "e f"}]


def test_text_beside_a_call_that_is_left_out(tokenizer: HuggingFace, tmp_path: Path) -> None:
    made = write_family(tmp_path / "llama", FAMILIES["llama-3"], tokenizer)
    with pytest.raises(Problem, match=r"leaves out the text beside the calls of message 1 \(assistant\): 'I look it up.'"):
        conversation_to_tokens.examples(Conversation([QUESTION, CALLING, RESULT, ANSWER], [TOOL]), made.chat_template, made)


@pytest.mark.parametrize(
    ("change", "conversation", "what"),
    [
        ("m.role != 'system'", [SYSTEM, QUESTION, ANSWER], r"the text of message 0 \(system\): 'Speak French.'"),
        ("not loop.first", [QUESTION, ANSWER, *LATER], "the text of message 0"),
        ("m.role != 'tool'", [QUESTION, CALLING | {"content": ""}, RESULT, ANSWER], "leaves results out"),
        ("loop.index0 != 2", [QUESTION, ANSWER, {"role": "user", "content": "b"}, ANSWER], "the text of message [123]"),
        ("m.content != 'c'", [QUESTION, ANSWER | {"content": "c"}], "the text of message 1"),
    ],
)
def test_what_is_left_out_is_named(tokenizer: HuggingFace, change: str, conversation: list, what: str) -> None:
    template = CALLS.replace("{% for m in messages %}", "{% for m in messages %}{% if " + change + " %}").replace(
        "{% endfor %}{{ eos_token }}", "{% endfor %}{{ eos_token }}", 1
    )
    template = template.removesuffix("{% endfor %}") + "{% endif %}{% endfor %}"
    tools = [TOOL] if any("tool_calls" in m for m in conversation) else []
    with pytest.raises(Problem, match=what) as caught:
        conversation_to_tokens.examples(Conversation(conversation, tools), template, tokenizer)
    assert "--chat-template" in caught.value.remedy


def test_a_changed_text_is_not_what_was_said(tokenizer: HuggingFace) -> None:
    for change in ("m.content|upper", "m.content.split('x')[-1]", "m.content|truncate(2, True, '', 0)"):
        template = MARKED.replace("BODY", "{{ " + change + " + eos_token }}")
        with pytest.raises(Problem, match="leaves out the text of message 1"):
            said = {"role": "assistant", "content": "ax bcd"}
            conversation_to_tokens.examples(Conversation([QUESTION, said], []), template, tokenizer)
    conversation_to_tokens.examples(Conversation([QUESTION, {"role": "assistant", "content": " a "}], []), CHATML, tokenizer)


def test_results_may_be_json_that_is_written_anew(tokenizer: HuggingFace) -> None:
    conversation = Conversation([QUESTION, CALLING, RESULT | {"content": '{"a":1,"b":["x y",2]}'}, ANSWER], [TOOL])
    said = "[INST]a[/INST]I look it up.f word quokka n 7</s>"
    result = ' {\n  "a": 1,\n  "b": ["x y", 2]\n}'
    call = (14, len(said))
    for text, missing in ((said + result + "b c</s>", False), (said + "b c</s>", True)):
        rendering = Rendering(text, [call, (len(text) - 7, len(text))], 4)
        if missing:
            with pytest.raises(Problem, match="leaves out the result of message 2"):
                check_rendered(conversation, [rendering], "", tokenizer)
        else:
            check_rendered(conversation, [rendering], "", tokenizer)


def test_a_result_that_a_later_call_repeats_as_json(tokenizer: HuggingFace) -> None:
    """An agent reads a file, and writes it: the result has the lines as they stand, and the call escapes them."""
    lines = 'a "b"\nGrüße'
    repeating = CALL | {"function": {"name": "f", "arguments": json.dumps({"content": lines})}}
    calling = {"role": "assistant", "tool_calls": [repeating]}
    read, written = RESULT | {"content": lines}, RESULT | {"content": "ok"}
    conversation = Conversation([QUESTION, CALLING, read, calling, written, ANSWER], [TOOL])
    rows = conversation_to_tokens.examples(
        conversation, CALLS.replace("c.function.name", "m.content|default('') + c.function.name"), tokenizer
    )
    assert sum(len(row.merged.ends) for row in rows if row.merged) == 3


def test_what_a_template_omits_is_not_looked_for_in_other_words() -> None:
    """Mistral's v2 omits older calls; the name of one is a question before it here."""
    asked = [
        {"role": "user", "content": "f"},
        CALLING | {"content": ""},
        RESULT | {"content": "result:"},
        ANSWER | {"content": "0"},
    ]
    conversation = Conversation([*asked, *LATER], [TOOL])
    text = "[INST] f[/INST]0</s>[AVAILABLE_TOOLS]f[/AVAILABLE_TOOLS][INST] d[/INST]e f</s>"
    rendering = Rendering(text, [(len(text) - 7, len(text))], 6)
    check_complete(conversation, [rendering], "[TOOL_RESULTS]")
    for template, left in (("", "message 1"), ("[TOOL_RESULTS]", "message 0")):
        with pytest.raises(Problem, match=left):
            check_complete(conversation, [rendering._replace(text=text.replace("] f[", "] q["))], template)


def test_a_question_that_a_later_turn_no_longer_sees() -> None:
    conversation = Conversation([QUESTION, ANSWER, *LATER], [])
    first = Rendering("[INST]a[/INST]b c</s>", [(14, 21)], 2)
    second = "[INST]d[/INST]e f</s>"
    whole = first.text + second
    check_complete(conversation, [first, Rendering(whole, [(len(whole) - 7, len(whole))], 4)], "")
    with pytest.raises(Problem, match="leaves out the text of message 0"):
        check_complete(conversation, [first, Rendering(second, [(14, 21)], 4)], "")


def test_arguments_as_python_writes_them(tokenizer: HuggingFace) -> None:
    conversation = Conversation([QUESTION, CALLING | {"content": ""}, RESULT, ANSWER], [TOOL])
    template = CALLS.replace("c.function.arguments|tojson", "c.function.arguments|string")
    with pytest.raises(Problem, match=r"arguments of a call of message 1 as Python does, and not as JSON: .*filter tojson"):
        conversation_to_tokens.examples(conversation, template, tokenizer)
    conversation_to_tokens.examples(conversation, CALLS, tokenizer)
    asked = QUESTION | {"content": "Call it with {'word': 'quokka', 'n': 7}."}
    conversation_to_tokens.examples(conversation._replace(messages=[asked, *conversation.messages[1:]]), CALLS, tokenizer)


def test_arguments_that_python_and_json_write_alike(tokenizer: HuggingFace) -> None:
    calls = [{"id": "aB3dE6gH9", "type": "function", "function": {"name": "f", "arguments": {"it's": [1, {}]}}}]
    conversation = Conversation([QUESTION, {"role": "assistant", "content": "", "tool_calls": calls}, RESULT, ANSWER], [TOOL])
    conversation_to_tokens.examples(conversation, CALLS, tokenizer)
