"""Keys that are not read are named at every level; those that change the meaning are refused unless they are ignored by name."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_train import config
from moe_train.data.records import meaning
from moe_train.data.records.meaning import MEANING_KEYS, lost_meaning
from moe_train.data.records.problem import Problem
from moe_train.data.records.unread import MAX_NAMES, NOT_LOADED, OTHERS, Unread, add_counts, count, in_words
from tests.data.conversations import conversations
from tests.data.records.reading import ANSWER, CALL, CALLING, RESULT, TOOL, USER, conversation, problem, reading

CHAT = {"messages": [USER, ANSWER]}
WITH_TOOLS = {"messages": [USER, CALLING, RESULT, ANSWER], "tools": [TOOL]}
FORMS: list[dict[str, Any]] = [
    {"text": "Once."},
    CHAT,
    WITH_TOOLS,
    {"prompt": "a", "completion": "b"},
    {"instruction": "a", "input": "b", "output": "c"},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": "a", "completion": "b", "label": True},
]


def objects_in(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Every object of a record that has keys of its own; not arguments and schemas, which are read whole."""
    found = [record]
    for message in record.get("messages", record.get("conversations", ())):
        found.append(message)
        if isinstance(message.get("content"), list):
            found += message["content"]
        for call in message.get("tool_calls", ()):
            found += [call, call["function"]]
    for tool in record.get("tools", ()):
        found += [tool, tool["function"]]
    return found


LEVELS = (
    *(meaning.RECORD, meaning.MESSAGE, meaning.PART),
    *(meaning.CALL, meaning.CALLED_FUNCTION, meaning.TOOL, meaning.TOOL_FUNCTION),
)
KEYS = st.one_of(st.text(min_size=1, max_size=80), st.sampled_from(["id", "source", "meta", "score", "cache_control", "a.b", "名"]))
KNOWN = MEANING_KEYS | {
    *("messages", "interactions", "conversations", "text", "content", "role", "from", "value", "type", "id", "name", "prompt"),
    *("completion", "question", "answer", "answers", "instruction", "output", "query", "response", "parameters", "input_schema"),
    *("inputSchema", "arguments", "args", "call_id", "tool_call_id", "function", "description", "strict", "closed"),
    *("reasoning_effort", "response_format"),
}
VALUES = st.one_of(st.booleans(), st.integers(), st.text(), st.lists(st.integers()), st.dictionaries(st.text(), st.integers()))


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.sampled_from(FORMS), conversations(tools=True), conversations(tools=False)), KEYS, VALUES, st.data())
def test_a_key_that_nobody_knows_is_named(form: dict[str, Any], key: str, value: object, data: st.DataObject) -> None:
    assume(key not in KNOWN and all(lost_meaning(level, key) is None for level in LEVELS))
    record = copy.deepcopy(form)
    target = data.draw(st.sampled_from(objects_in(record)))
    target[key] = value
    before = reading(form)
    normal, unread = reading(record)
    assert normal == before.record
    (name,) = [name for name in unread if name not in before.unread]
    assert name.endswith(key if len(key) <= 60 else key[:57] + "...")


@pytest.mark.parametrize("key", sorted(MEANING_KEYS))
@pytest.mark.parametrize("form", FORMS[:2])
def test_a_key_that_changes_the_meaning_is_read_or_refused(form: dict[str, Any], key: str) -> None:
    record = config.TextRecord(name="text") if "text" in form else config.ChatRecord(name="chat")
    for value in (["a"], {"a": 1}, 0.5):
        try:
            normal, unread = reading({**form, key: value}, record)
        except Problem:
            continue
        assert normal != reading(form, record).record and unread == ()


@pytest.mark.parametrize("key", sorted(MEANING_KEYS - {"tool_calls"}))
def test_so_is_one_of_a_message(key: str) -> None:
    for value in (["a"], {"a": 1}, 0.5):
        assert problem({"messages": [USER, ANSWER | {key: value}]}).message.count("message 1") == 1


@pytest.mark.parametrize("key", ["Label", "IMAGES", " label", "lossWeight", "loss-weight", "reasoningContent", "System Prompt"])
def test_other_spellings_of_such_a_key_are_refused_too(key: str) -> None:
    assert problem({"text": "a", key: "b"}).rule == "unread-key"
    assert reading({"text": "a", key: "b"}, ignore=(key,)).unread == (key,)


def test_a_key_with_nothing_in_it_says_nothing() -> None:
    empty = {"images": [], "history": [], "label": None, "input": "", "tools": None, "chat_template_kwargs": {}}
    assert conversation(CHAT | empty) == conversation(CHAT)
    assert conversation({"messages": [USER, ANSWER | {"train": None, "function_call": None, "images": []}]}) == conversation(CHAT)


@pytest.mark.parametrize(
    ("fields", "ignore", "named"),
    [
        (CHAT | {"label": 3}, "label", "label"),
        (CHAT | {"images": ["a.png"]}, "images", "images"),
        ({"messages": [USER, ANSWER | {"reasoning": "So."}]}, "reasoning", "messages.reasoning"),
        ({"messages": [USER, ANSWER | {"reasoning": "So."}]}, "messages.reasoning", "messages.reasoning"),
        ({"messages": [USER, CALLING, RESULT | {"mask": 1}, ANSWER], "tools": [TOOL]}, "mask", "messages.mask"),
    ],
)
def test_what_is_ignored_by_name_is_allowed_and_named(fields: dict[str, Any], ignore: str, named: str) -> None:
    normal, unread = reading(fields, ignore=(ignore,))
    assert unread == (named,)
    assert normal == reading(CHAT if "tools" not in fields else WITH_TOOLS).record


def test_the_remedy_works() -> None:
    for fields in (CHAT | {"context": "c"}, {"messages": [USER, ANSWER | {"loss_mask": [1]}]}, {"text": "a", "label": "b"}):
        refused = problem(fields)
        name = refused.remedy.partition("--ignore ")[2].partition(" ")[0]
        assert refused.rule == "unread-key" and reading(fields, ignore=(name,)).unread == (name,)


@pytest.mark.parametrize(
    ("extra", "inner"),
    [
        ({"additional_kwargs": {"tool_calls": [{"name": "f"}]}}, "tool_calls"),
        ({"provider_specific_fields": {"id": 1, "reasoning_content": "So."}}, "reasoning_content"),
        ({"meta": {"weight": 0}}, "weight"),
    ],
)
def test_a_key_inside_of_an_unread_object_of_a_message_is_refused_too(extra: dict[str, Any], inner: str) -> None:
    fields = {"messages": [USER, ANSWER | extra]}
    refused = problem(fields)
    assert refused.rule == "unread-key" and f"with {inner!r} in it" in refused.message
    (name,) = [f"messages.{key}" for key in extra]
    assert f"--ignore {name} " in refused.remedy and reading(fields, ignore=(name,)).unread == (name,)


def test_an_object_that_only_describes_is_named() -> None:
    message = ANSWER | {"additional_kwargs": {"refusal": None}, "usage": {"reasoning_tokens": 3}}
    tool = TOOL | {"outputSchema": {"properties": {}}}
    record = {"messages": [USER, message], "tools": [tool], "metadata": {"label": 1, "reasoning": "So."}}
    assert reading(record).unread == ("messages.additional_kwargs", "messages.usage", "tools.outputSchema", "metadata")


def test_a_column_that_is_not_loaded_is_named() -> None:
    assert reading(CHAT | {"embedding": NOT_LOADED}).unread == ("embedding",)


def test_counts_in_words() -> None:
    assert in_words({}) == ""
    assert in_words({"tools": 12, "label": 300}) == "label (300 records), tools (12)"
    assert in_words({"id": 1}) == "id (1 record)"
    assert in_words({f"k{n:02}": 1 for n in range(14)}).endswith("k11 (1), and 2 more")


def test_the_number_of_names_is_bounded() -> None:
    total: Counter[str] = Counter()
    for n in range(3 * MAX_NAMES):
        count(total, (f"k{n}", "id"))
    add_counts(total, {"id": 5, "late": 1})
    assert len(total) <= MAX_NAMES + 1 and total["id"] == 3 * MAX_NAMES + 5
    assert total[OTHERS] == sum(total.values()) - total["id"] - (len(total) - 2)


def test_a_call_and_a_tool_have_levels_of_their_own() -> None:
    call = CALL | {"index": 0, "function": CALL["function"] | {"strict": True}}
    tool = TOOL | {"cache_control": {}, "function": TOOL["function"] | {"returns": {}}}
    unread = reading({"messages": [USER, CALLING | {"tool_calls": [call]}, RESULT, ANSWER], "tools": [tool]}).unread
    assert set(unread) == {"tool_calls.index", "tool_calls.function.strict", "tools.cache_control", "tools.function.returns"}


def test_opened_and_closed() -> None:
    unread = Unread(("b",))
    left = unread.opened("x.", {"a": 1, "b": 2, "c": None})
    assert left == {"a": 1}
    unread.close("it", "x.", left)
    assert list(unread.names) == ["x.b", "x.a"]
