"""Tokens are mistral-common's own, id for id; what is trained_on follows from the segments, one after the other."""

from __future__ import annotations

import collections
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from moe_train import config
from moe_train.data.chat import mistral
from moe_train.data.chat.conversation_to_tokens import examples
from moe_train.data.chat.example import Example
from moe_train.data.records.conversation import normalise
from moe_train.data.records.normal_form import Conversation
from moe_train.data.tokenizers.mistral import Mistral
from tests.data.chat.chats import CALL, TOOL
from tests.data.chat.trajectories import predictions, trained_ids
from tests.data.conversations import conversations, thinks
from tests.data.hugging_face import DATA, small_tekken
from tests.data.hugging_face import FILES as SENTENCEPIECE

FILES = {**SENTENCEPIECE, "tekken": "tekken_240911.json"}
LATER = ("v7", "v11", "v13", "v15")
"""Versions of which no file is at hand: a small published vocabulary under their numbers."""
KINDS = [(version, tools) for version in FILES for tools in (False, True) if not (version == "v1" and tools)]

_loaded: dict[str, tuple[Mistral, MistralTokenizer]] = {}


def both(version: str) -> tuple[Mistral, MistralTokenizer]:
    """Ours, and theirs loaded by itself."""
    if version not in _loaded:
        file = DATA / FILES[version] if version in FILES else small_tekken(Path(tempfile.mkdtemp()), version.removeprefix("small-"))
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
    stated = {key: record[key] for key in ("reasoning_effort", "response_format") if key in record}
    return [_reference(messages[:end], tools, stated, theirs) for end in ends]


def _reference(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, stated: dict[str, Any], theirs: MistralTokenizer
) -> Example:
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    if "tool_calls" in plain[-1] and theirs.version < "v13":  # a trained_on call has no id; later ones are never written
        plain[-1]["tool_calls"] = [{"function": call["function"]} for call in plain[-1]["tool_calls"]]
    request = ChatCompletionRequest.model_validate({"messages": plain, "tools": tools, **stated})
    weights = [m["weight"] for m in messages if m["role"] == "assistant"]
    normal = theirs._instruct_request_normalizer.from_chat_completion_request(request)
    encoder: Any = theirs.instruct_tokenizer
    first, last = encoder.find_first_last_user(normal)
    tokens, mask = encoder.start(), [False]
    for i, m in enumerate(normal.messages):
        trained_on = False
        match m:
            case UserMessage():
                where = i == last, i == first
                beside: dict[str, Any] = {"system_prompt": normal.system_prompt, "settings": normal.settings}
                segment = encoder.encode_user_message(m, normal.available_tools, *where, **beside)[0]
            case SystemMessage():
                segment = encoder.encode_system_message(m)[0]
            case ToolMessage():
                segment = encoder.encode_tool_message(m, i < last)[0]
            case AssistantMessage():
                segment = encoder.encode_assistant_message(m, i < last)
                trained_on = weights.pop(0) == 1 and (not tools or i == len(normal.messages) - 1)
        tokens += segment
        mask += [trained_on] * len(segment)
    if theirs.version == "v11":  # its validator takes calls without ids for calls of one id
        assert tokens == encoder.encode_instruct(normal).tokens
    else:
        assert tokens == theirs.encode_chat_completion(request).tokens
    return Example(tokens, mask)


def compare_merged(merged: list[Example], separate: list[Example], ours: Mistral) -> None:
    """Merged turns train on the predictions of separate ones, except after the ids of calls that are generated without one."""
    expected, found = predictions(separate), predictions(merged)
    assert sum(example.merged.separate_tokens for example in merged if example.merged) == sum(len(e.tokens) for e in separate)
    missing, other = expected - found, found - expected
    if ours.finetuning.version in ("v2", "v13", "v15"):
        assert not missing and not other
        return
    calls = [predictions([e]) for e in separate if "[TOOL_CALLS]" in ours.decode(trained_ids(e), keep_special=True)]
    # Only ends of calls are missing, but not of all calls; in their place are ends after an id.
    assert all(any(prediction in call for call in calls) for prediction in missing)
    assert not calls or any(not call - found for call in calls)
    assert other.total() <= missing.total()


def _records(version: str, tools: bool) -> st.SearchStrategy[dict[str, Any]]:
    """Records with everything that a version writes."""
    return conversations(
        tools=tools,
        max_calls=1 if version == "v2" else 3,
        content_beside_calls=version not in ("v1", "v2", "v3"),
        parts=True,
        thinking={"v13": ("assistant", "system"), "v15": ("assistant",)}.get(version, ()),
    )


def _settings(with_high_effort: bool) -> st.SearchStrategy[dict[str, Any]]:
    """Settings of a record."""
    schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"const": "</s>"}}}
    formats = [{"type": "text"}, {"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}]
    effort = st.just("high") if with_high_effort else st.sampled_from(["none", "high"])
    optional = {"response_format": st.sampled_from(formats)} | ({} if with_high_effort else {"reasoning_effort": effort})
    return st.fixed_dictionaries({"reasoning_effort": effort} if with_high_effort else {}, optional=optional)


def check_equal(version: str, tools: bool, wanted: int) -> collections.Counter[str]:
    """Draw at least `wanted` different conversations, compare each, and count what was drawn."""
    ours, theirs = both(version)
    seen: set[str] = set()
    counts: collections.Counter[str] = collections.Counter()

    @settings(max_examples=wanted + wanted // 5, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(_records(theirs.version, tools), st.data())
    def compare(record: dict[str, Any], data: st.DataObject) -> None:
        if theirs.version == "v15":
            record |= data.draw(_settings(thinks(record)))
        found = trained(record, ours)
        if tools:
            compare_merged(found, reference(record, theirs), ours)
        else:
            assert found == reference(record, theirs)
        if (key := json.dumps(record)) not in seen:
            seen.add(key)
            counts.update(conversations=1, examples=len(found), trained_on=sum(sum(each.loss_mask or ()) for each in found))
            counts.update(system=record["messages"][0]["role"] == "system", calls=key.count('"tool_calls"'), long=len(key) > 2000)
            counts.update(thoughts=key.count('"thinking": "'), lists=key.count('"content": ['), settings="reasoning_effort" in key)

    compare()
    assert counts["conversations"] >= wanted
    return counts


@pytest.mark.parametrize(("version", "tools"), KINDS)
def test_tokens_and_masks_are_mistral_commons(version: str, tools: bool) -> None:
    check_equal(version, tools, 25)


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("version", LATER)
def test_later_versions(version: str, tools: bool) -> None:
    check_equal(f"small-{version}", tools, 10)


@pytest.mark.slow
@pytest.mark.parametrize(("version", "tools"), KINDS)
def test_tokens_and_masks_are_mistral_commons_over_a_thousand_conversations(version: str, tools: bool) -> None:
    counts = check_equal(version, tools, 1000 if version == "v1" else 500)
    print(version, "with tools" if tools else "without tools", dict(counts))
    assert counts["system"] > 100 and counts["long"] > 100 and (counts["calls"] > 500 or not tools)


ASKED = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [CALL]}]
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "content": "1"}
ANSWER = {"role": "assistant", "content": "b"}


def test_a_call_is_trained_on_without_its_id_and_seen_with_it() -> None:
    ours, _ = both("v3")
    record = {"messages": [*ASKED, RESULT, ANSWER, {"role": "user", "content": "c"}, ANSWER | {"weight": 0}], "tools": [TOOL]}
    call, row = trained(record, ours)
    said = [ours.decode(trained_ids(example), keep_special=True).replace("▁", " ") for example in (call, row)]
    assert said == ['[TOOL_CALLS] [{"name": "f", "arguments": {}}]</s>', " b</s>"]
    assert "abcdefghi" in ours.decode(row.tokens) and "abcdefghi" not in ours.decode(call.tokens)
    # What comes before is what a server sends.
    assert row.tokens[: len(row.tokens) - 2] == mistral.prompt(Conversation([*ASKED, RESULT], [TOOL]), ours).tokens
    prompt = mistral.prompt(Conversation(ASKED[:1], [TOOL]), ours).tokens
    assert call.tokens[: len(prompt)] == prompt == call.tokens[: (call.loss_mask or []).index(True)]


@pytest.mark.parametrize(
    ("version", "messages", "reason"),
    [
        (
            "v1",
            [*ASKED, RESULT, ANSWER],
            r"tokenizer\.model\.v1, a tokenizer of version v1, has no tokens .*v2, v3, v7.*--tokenizer v3",
        ),
        (
            "v2",
            [ASKED[0], ASKED[1] | {"tool_calls": [CALL, CALL]}, RESULT, RESULT, ANSWER],
            "message 1 has 2 results",
        ),
        ("v3", [ASKED[0], ASKED[1] | {"content": "x"}, RESULT, ANSWER], "message 1 has text beside the calls"),
        ("v3", [ASKED[0], ASKED[1] | {"tool_calls": [CALL | {"id": "1"}]}, RESULT, ANSWER], "message 1 calls f with the id '1'"),
        ("v3", [ASKED[0], ANSWER, RESULT, ANSWER], "message 1 has 0 calls .* and 1 results"),
        ("v7", [*ASKED, RESULT, RESULT, ANSWER], "message 1 has 1 calls .* and 2 results"),
        ("v3", [*ASKED, RESULT, ANSWER | {"weight": 0}, {"role": "user", "content": "c"}], "the last message is user"),
        ("v3", [ASKED[0], ASKED[1] | {"weight": 0}, RESULT, ANSWER | {"weight": 0}], "no token would bear loss"),
    ],
)
def test_what_is_refused(version: str, messages: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        trained({"messages": messages, "tools": [TOOL]}, both(version)[0])
    assert "\n" not in str(caught.value)
