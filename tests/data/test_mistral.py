"""Tokens are mistral-common's own, id for id; what is learnt follows from the segments, one after the other."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from hypothesis import HealthCheck, given, settings
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from moe_train import config
from moe_train.data.chat import examples
from moe_train.data.conversation import Conversation, normalise
from moe_train.data.example import Example
from moe_train.data.tokenizer import Mistral
from tests.data.conversations import conversations

DATA = Path(mistral_common.__file__).parent / "data"
FILES = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
    "tekken": "tekken_240911.json",
}
KINDS = [(version, tools) for version in FILES for tools in (False, True) if not (version == "v1" and tools)]

_loaded: dict[str, tuple[Mistral, MistralTokenizer]] = {}


def both(version: str) -> tuple[Mistral, MistralTokenizer]:
    """Ours, and theirs loaded by itself."""
    if version not in _loaded:
        file = DATA / FILES[version]
        _loaded[version] = Mistral(file), MistralTokenizer.from_file(file, mode=ValidationMode.finetuning)
    return _loaded[version]


def trained(record: dict[str, Any], tokenizer: Mistral) -> list[Example]:
    conversation = normalise(record, config.ChatRecord(name="chat"))
    assert isinstance(conversation, Conversation)
    return examples(conversation, None, tokenizer)


def reference(record: dict[str, Any], theirs: MistralTokenizer) -> list[Example]:
    """mistral-common's tokens of the record, or of its prefixes where it has tools; the mask segment by segment."""
    messages, tools = record["messages"], record.get("tools")
    ends = [i + 1 for i, m in enumerate(messages) if m["role"] == "assistant" and m["weight"]] if tools else [len(messages)]
    return [_reference(messages[:end], tools, theirs) for end in ends]


def _reference(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, theirs: MistralTokenizer) -> Example:
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    if "tool_calls" in plain[-1]:  # a learnt call has no id
        plain[-1]["tool_calls"] = [{"function": call["function"]} for call in plain[-1]["tool_calls"]]
    request = ChatCompletionRequest.model_validate({"messages": plain, "tools": tools})
    weights = [m["weight"] for m in messages if m["role"] == "assistant"]
    normal = theirs._instruct_request_normalizer.from_chat_completion_request(request)
    encoder: Any = theirs.instruct_tokenizer
    first, last = encoder.find_first_last_user(normal)
    tokens, mask = encoder.start(), [False]
    for i, m in enumerate(normal.messages):
        learnt = False
        match m:
            case UserMessage():
                where = i == last, i == first
                segment = encoder.encode_user_message(m, normal.available_tools, *where, system_prompt=normal.system_prompt)[0]
            case SystemMessage():
                segment = encoder.encode_system_message(m)[0]
            case ToolMessage():
                segment = encoder.encode_tool_message(m, i < last)[0]
            case AssistantMessage():
                segment = encoder.encode_assistant_message(m, i < last)
                learnt = weights.pop(0) == 1 and (not tools or i == len(normal.messages) - 1)
        tokens += segment
        mask += [learnt] * len(segment)
    assert tokens == theirs.encode_chat_completion(request).tokens
    return Example(tokens, mask)


def check_equal(version: str, tools: bool, wanted: int) -> collections.Counter[str]:
    """Draw at least `wanted` different conversations, compare each, and count what was drawn."""
    ours, theirs = both(version)
    seen: set[str] = set()
    counts: collections.Counter[str] = collections.Counter()

    @settings(max_examples=wanted + wanted // 5, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(conversations(tools=tools, max_calls=1 if version == "v2" else 3, content_beside_calls=version == "v7"))
    def compare(record: dict[str, Any]) -> None:
        found = trained(record, ours)
        assert found == reference(record, theirs)
        if (key := json.dumps(record)) not in seen:
            seen.add(key)
            counts.update(conversations=1, examples=len(found), learnt=sum(sum(each.loss_mask or ()) for each in found))
            counts.update(system=record["messages"][0]["role"] == "system", calls=key.count('"tool_calls"'), long=len(key) > 2000)

    compare()
    assert counts["conversations"] >= wanted
    return counts


@pytest.mark.parametrize(("version", "tools"), KINDS)
def test_tokens_and_masks_are_mistral_commons(version: str, tools: bool) -> None:
    check_equal(version, tools, 25)


@pytest.mark.slow
@pytest.mark.parametrize(("version", "tools"), KINDS)
def test_tokens_and_masks_are_mistral_commons_over_a_thousand_conversations(version: str, tools: bool) -> None:
    counts = check_equal(version, tools, 1000 if version == "v1" else 500)
    print(version, "with tools" if tools else "without tools", dict(counts))
    assert counts["system"] > 100 and counts["long"] > 100 and (counts["calls"] > 500 or not tools)
