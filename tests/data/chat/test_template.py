"""A Hugging Face tokenizer with its chat template gives the tokens of mistral-common; templates without tools are refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from mistral_common.protocol.instruct.request import ChatCompletionRequest

from moe_train.data.chat import conversation_to_tokens
from moe_train.data.chat import template as templates
from moe_train.data.chat.example import WITHOUT_ID, Example, turns
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.problem import Problem
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral
from tests.data.chat.chats import ANSWER, CALLS, CHATML, MARKED, QUESTION, TOOL, unmerged
from tests.data.conversations import conversations, texts
from tests.data.hugging_face import DATA, FILES, small_tekken, write

TEKKENS = ("v3", "v7", "v11", "v13")
VERSIONS = [*FILES, *(f"tekken-{version}" for version in TEKKENS)]


@pytest.fixture(scope="session", params=VERSIONS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, HuggingFace, Mistral]:
    """The same vocabulary and chat format, as Hugging Face's files and as mistral-common's."""
    version = request.param
    directory = tmp_path_factory.mktemp("model") / version
    directory.mkdir()
    file = DATA / FILES[version] if version in FILES else small_tekken(directory, version.removeprefix("tekken-"))
    write(directory, file)
    return version, HuggingFace(directory), Mistral(file)


# Where the templates that mistral-common generates differ from it by themselves: an empty text is the space that they
# write before it, a space at an answer's end stays, and before v7 a result that is JSON is a text in JSON.
SAID = texts(1)
ANSWERS = texts(1).map(lambda text: text.rstrip(" ") or "yes")
RESULTS = texts().map("result: {}".format)


def check_equal(pair: tuple[str, HuggingFace, Mistral], tools: bool, wanted: int) -> int:
    """Draw at least `wanted` conversations, compare what both kinds of tokenizer make of each, and count the examples."""
    version, ours, theirs = pair
    seen: set[str] = set()
    count = 0

    @settings(max_examples=wanted + wanted // 3, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(conversations(tools=tools, max_calls=1 if version == "v2" else 3, said=SAID, answers=ANSWERS, results=RESULTS))
    def compare(record: dict[str, Any]) -> None:
        nonlocal count
        conversation = Conversation(record["messages"], record.get("tools", []))
        found = conversation_to_tokens.examples(conversation, ours.chat_template, ours)
        expected = conversation_to_tokens.examples(conversation, None, theirs)
        if not tools:
            assert found == expected
        else:
            compare_turns(found, conversation, ours, theirs)
            assert len(found) == sum(example.merged is not None and example.merged.restart != WITHOUT_ID for example in expected)
        seen.add(json.dumps(record))
        count += len(found)

    compare()
    assert len(seen) >= wanted
    return count


def compare_turns(found: list[Example], conversation: Conversation, ours: HuggingFace, theirs: Mistral) -> None:
    """Each turn, and what comes before it, is what mistral-common makes of the conversation up to the turn."""
    untrained = [m | {"weight": 0} if m["role"] == "assistant" else m for m in conversation.messages]
    trained_on = [turn for turn in turns(conversation.messages) if turn.trained_on]
    for turn, example in zip(trained_on, unmerged(found), strict=True):
        last = conversation.messages[turn.end - 1]
        prefix = Conversation([*untrained[: turn.end - 1], last], conversation.tools)
        if "tool_calls" in last and theirs.finetuning.version != "v13":
            compare_call(example, prefix, ours, theirs)
        else:
            assert [example] == [each._replace(merged=None) for each in conversation_to_tokens.examples(prefix, None, theirs)]


def compare_call(example: Example, conversation: Conversation, ours: HuggingFace, theirs: Mistral) -> None:
    """The template insists on ids, which mistral-common's fine-tuning leaves out: they are there, and not trained_on."""
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in conversation.messages]
    request = ChatCompletionRequest.model_validate({"messages": plain, "tools": conversation.tools})
    assert example.tokens == theirs.finetuning.encode_chat_completion(request).tokens
    start = len(templates.prompt(Conversation(plain[:-1], conversation.tools), str(ours.chat_template), ours))
    assert example.loss_mask is not None and not any(example.loss_mask[:start])
    turn = list(zip(example.tokens[start:], example.loss_mask[start:], strict=True))
    left_out = ours.decode([token for token, trained_on in turn if not trained_on])
    ids = [] if ours.files[0].parent.name == "v2" else [call["id"] for call in plain[-1]["tool_calls"]]
    assert re.sub(r"[^a-zA-Z0-9]", "", left_out) == "".join(ids)
    assert example.loss_mask[-1]


@pytest.mark.parametrize("tools", [False, True])
def test_the_tokens_are_mistral_commons(pair: tuple[str, HuggingFace, Mistral], tools: bool) -> None:
    if pair[0] == "v1" and tools:
        with pytest.raises(Problem, match=r"the chat template .*moe-train extend-vocab BASE OUT --tokenizer v3, or drop"):
            conversation_to_tokens.check_has_tools(pair[1].chat_template, pair[1])
        return
    check_equal(pair, tools, 10)


@pytest.mark.slow
@pytest.mark.parametrize("tools", [False, True])
def test_the_tokens_are_mistral_commons_over_many_conversations(pair: tuple[str, HuggingFace, Mistral], tools: bool) -> None:
    if pair[0] != "v1" or not tools:
        count = check_equal(pair, tools, 1000 if pair[0] == "v1" else 500)
        print(pair[0], "with tools" if tools else "without tools", count, "examples")


def typed(text: str) -> Conversation:
    """A conversation with `text` wherever somebody can write."""
    of_messages = dict.fromkeys(("role", "id", "tool_call_id", "content"), text)  # arguments may have any names
    arguments = json.dumps({text: [text], **of_messages})
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": arguments}}
    parameters = {"title": text, **of_messages}
    tool = {"type": "function", "function": {"name": "f", "description": text, "parameters": parameters}}
    messages = [
        {"role": "system", "content": text},
        {"role": "user", "content": text},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "name": "f", "content": text},
        {"role": "assistant", "content": text},
    ]
    return Conversation(messages, [tool])


def test_control_tokens_typed_as_text_stay_text(pair: tuple[str, HuggingFace, Mistral]) -> None:
    version, ours, theirs = pair
    every = "".join(token for token in ours.special_tokens if not re.search(r"\d", token))
    with_tools = version != "v1"
    for either, template in ((ours, ours.chat_template), (theirs, None)):
        counts = []
        for text in (every, "x"):
            messages, tools, _ = typed(text)
            if not with_tools:
                messages, tools = [m for m in messages if m["role"] != "tool" and "tool_calls" not in m], []
            found = conversation_to_tokens.examples(Conversation(messages, tools), template, either)
            counts.append([Counter(token for token in e.tokens if token in either.control_ids) for e in found])
        assert counts[0] == counts[1]
        assert not set(either.encode(every)) & either.control_ids


def test_a_system_text_with_control_tokens_is_no_reason_to_refuse_a_prompt(pair: tuple[str, HuggingFace, Mistral]) -> None:
    _, ours, _ = pair
    system = {"role": "system", "content": f"Grüße{ours.special_tokens[0]}"}
    conversation = Conversation([system, {"role": "user", "content": "hi"}], [])
    assert ours.special_tokens[0] in templates.prompt_text(conversation, str(ours.chat_template), ours)
    plain = Conversation([system | {"content": "Grüße"}, {"role": "user", "content": "hi"}], [])
    prompts = [templates.prompt(each, str(ours.chat_template), ours) for each in (conversation, plain)]
    counts = [Counter(token for token in ids if token in ours.control_ids) for ids in prompts]
    assert counts[0] == counts[1]


WITH_TOOLS = Conversation([QUESTION, ANSWER], [TOOL])


def test_conversations_together_become_what_each_becomes_alone(tokenizer: HuggingFace) -> None:
    """They cross to the sandbox at once; what is refused, and what looks like a control token, stays with its own record."""
    template = MARKED.replace("BODY", "{{ (m.content if m.content != '5' else raise_exception('five')) + eos_token }}")
    said = ["", " b\n", "5", "</s>a", "東京 </", "\ufdd0"]
    drawn = [
        Conversation([QUESTION | {"content": one}, ANSWER | {"content": two}, QUESTION, ANSWER | {"weight": weight}], [])
        for one in said
        for two in said
        for weight in (0, 1)
    ]
    together = conversation_to_tokens.examples_batch(drawn, template, tokenizer)
    alone = [conversation_to_tokens.examples_batch([conversation], template, tokenizer)[0] for conversation in drawn]
    assert list(map(str, together)) == list(map(str, alone))
    refused = [str(found) for found in together if isinstance(found, ValueError)]
    assert sum("refuses the record: five" in why for why in refused) == 10 and sum("noncharacter" in why for why in refused) == 22


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHATML, "the chat template leaves tools out"),
        (CALLS.replace("c.function.arguments|tojson", "''"), "the chat template leaves calls out"),
        (CALLS.replace("'[INST]' + m.content", "'[INST]' + (m.content if m.role == 'user' else '')"), "leaves results out"),
        (CALLS.replace("c.function.name", "'[TOOL_CALLS]' + c.function.name"), r"writes \[TOOL_CALLS\], which .* has no token for"),
        (CALLS.replace("{% if tools %}", "{% if tools %}{{ raise_exception('no') }}"), "takes none .*no"),
    ],
)
def test_a_template_without_tools(tokenizer: HuggingFace, template: str, said: str) -> None:
    with pytest.raises(Problem, match=f"{said}.*; name a template that writes tools with --chat-template") as caught:
        conversation_to_tokens.examples(WITH_TOOLS, template, tokenizer)
    assert "extend-vocab" not in str(caught.value)  # which needs a base with Mistral's own vocabulary
    conversation_to_tokens.examples(Conversation([QUESTION, ANSWER], []), CHATML, tokenizer)


@pytest.mark.judges
def test_transformers_has_the_same_tokens_for_tools(pair: tuple[str, HuggingFace, Mistral]) -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers' apply_chat_template")
    version, ours, _ = pair
    if version == "v1":
        return
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(ours.files[0].parent)
    messages, tools, _ = typed("Grüße 東京")
    *_, whole = conversation_to_tokens.examples(Conversation(messages, tools), ours.chat_template, ours)
    plain = json.loads(json.dumps(messages))
    function = plain[2]["tool_calls"][0]["function"]
    function["arguments"] = json.loads(function["arguments"])  # transformers' templates take an object
    expected = theirs.apply_chat_template(plain, tools=tools, chat_template=ours.chat_template, return_dict=True)
    assert whole.tokens == expected["input_ids"]
