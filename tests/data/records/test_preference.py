"""Preference pairs and labelled answers, in every spelling, and pairs that are none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moe_train import config
from moe_train.data.records.conversation import normalise
from moe_train.data.records.normal_form import Conversation, LabelledAnswer, PreferencePair
from moe_train.data.records.problem import Problem
from tests.data.records.reading import TOOL, problem, reading

Q = {"role": "user", "content": "Name a red fruit."}
GOOD = {"role": "assistant", "content": "Cherry."}
BAD = {"role": "assistant", "content": "Stone."}
PAIR = PreferencePair(Conversation([Q], []), [GOOD], [BAD])
SHAREGPT = [{"from": "human", "value": Q["content"]}]
CHERRY, STONE = {"from": "gpt", "value": "Cherry."}, {"from": "gpt", "value": "Stone."}
TEXTS = {"chosen": "Cherry.", "rejected": "Stone."}
RANKED = [{"answer": "Stone.", "rank": 2}, {"answer": "Cherry.", "rank": 1}]

PAIRS: list[dict[str, Any]] = [
    {"prompt": Q["content"], **TEXTS},
    {"question": Q["content"], **TEXTS},
    {"instruction": "Name a", "input": "red fruit.", **TEXTS},
    {"instruction": Q["content"], "input": "", "chosen_response": "Cherry.", "rejected_response": "Stone."},
    {"query": Q["content"], "response": "Cherry.", "rejected_response": "Stone."},
    {"prompt": [Q], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": [Q], "chosen": GOOD, "rejected": BAD},
    {"prompt": Q["content"], "chosen": [Q, GOOD], "rejected": [Q, BAD]},
    {"chosen": [Q, GOOD], "rejected": [Q, BAD]},
    {"messages": [Q], "chosen": GOOD, "rejected": BAD},
    {"messages": json.dumps([Q]), **TEXTS},
    {"prompt": json.dumps([Q]), "chosen": json.dumps([GOOD]), "rejected": json.dumps(BAD)},
    {"chosen": json.dumps([Q, GOOD]), "rejected": json.dumps([Q, BAD])},
    {"messages": [Q, GOOD], "rejected_response": "Stone."},
    {"messages": [Q, GOOD], "rejected_messages": [Q, BAD]},
    {"chosen_messages": [Q, GOOD], "rejected_messages": [Q, BAD]},
    {"conversations": SHAREGPT, "chosen": CHERRY, "rejected": STONE},
    {"conversations": SHAREGPT, "chosen": [CHERRY], "rejected": [STONE]},
    {"prompt": Q["content"], "answers": RANKED},
    {"question": Q["content"], "answers": json.dumps(RANKED)},
]


@pytest.mark.parametrize("fields", PAIRS)
def test_every_spelling_of_a_pair(fields: dict[str, Any]) -> None:
    normal, unread = reading(fields)
    if fields.get("input"):
        assert isinstance(normal, PreferencePair)
        assert normal.prompt.messages[0]["content"] == "Name a\nred fruit."
        normal = normal._replace(prompt=PAIR.prompt)
    assert normal == PAIR and unread == ()


def test_a_pair_of_texts_with_an_implicit_prompt() -> None:
    normal, _ = reading({"chosen": "Human: Hi Assistant: Hello", "rejected": "Human: Hi Assistant: No"})
    assert isinstance(normal, PreferencePair)
    assert normal.prompt.messages == [{"role": "user", "content": "Human: Hi Assistant:"}]
    assert [normal.chosen[0]["content"], normal.rejected[0]["content"]] == [" Hello", " No"]


def test_a_pair_with_a_system_text_tools_and_history() -> None:
    normal, _ = reading({"prompt": Q["content"], **TEXTS, "system": "Be brief.", "tools": [TOOL], "history": [["a", "b"]]})
    assert isinstance(normal, PreferencePair) and normal.prompt.tools == [TOOL]
    assert [message["content"] for message in normal.prompt.messages] == ["Be brief.", "a", "b", Q["content"]]
    system = {"role": "system", "content": "Be brief."}
    normal, _ = reading({"prompt": Q["content"], "chosen": [system, Q, GOOD], "rejected": [system, Q, BAD]})
    assert normal == PreferencePair(Conversation([system, Q], []), [GOOD], [BAD])


def test_answers_beyond_the_second_rank_are_named() -> None:
    normal, unread = reading({"prompt": Q["content"], "answers": [*RANKED, {"answer": "Pear.", "rank": 3, "model": "x"}]})
    assert normal == PAIR and set(unread) == {"answers.answer", "answers.rank", "answers.model"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"chosen": [Q, GOOD], "rejected": [Q | {"content": "Other?"}, BAD]}, "do not begin alike"),
        ({"chosen": "Cherry", "rejected": "Stone"}, "do not begin alike"),
        ({"prompt": "Other?", "chosen": [Q, GOOD], "rejected": [Q, BAD]}, "not about one prompt"),
        ({"prompt": [Q], "chosen": [Q, GOOD], "rejected": [Q | {"content": "Other?"}, BAD]}, "not about one prompt"),
        ({"prompt": "a", "answers": RANKED[:1]}, "fewer than two"),
        ({"prompt": "a", "answers": [RANKED[0], RANKED[0]]}, "several answers of rank"),
        ({"prompt": "a", "answers": [{"rank": 1}, {"answer": "b", "rank": 2}]}, "should be a list of answers"),
        (
            {"prompt": "a", "answers": [{"answer": "b", "rank": True}, {"answer": "c", "rank": False}]},
            "should be a list of answers",
        ),
        ({"prompt": "a", "answers": [{"answer": "b", "rank": 1}, {"answer": "c", "rank": float("nan")}]}, "list of answers"),
        ({"prompt": "a", "chosen": ["b"], "rejected": ["c"]}, "should be text or messages"),
        (
            {"input": {"messages": [Q], "tools": []}, "tools": [], "preferred_output": [GOOD], "non_preferred_output": [BAD]},
            "tools",
        ),
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, "should be text"),
        ({"prompt": "a", **TEXTS, "label": True}, "has the key 'label'"),
    ],
)
def test_what_is_no_pair(fields: dict[str, Any], said: str) -> None:
    assert said in problem(fields).message


LABELLED: list[dict[str, Any]] = [
    {"prompt": Q["content"], "completion": "Cherry."},
    {"prompt": [Q], "completion": [GOOD]},
    {"messages": [Q, GOOD]},
    {"conversations": [*SHAREGPT, CHERRY]},
    {"instruction": Q["content"], "input": "", "output": "Cherry."},
]


@pytest.mark.parametrize("fields", LABELLED)
@pytest.mark.parametrize("name", ["label", "kto_tag"])
def test_every_spelling_of_a_labelled_answer(fields: dict[str, Any], name: str) -> None:
    for value, good in ((True, True), (False, False), ("false", False), ("True", True)):
        assert reading(fields | {name: value}) == (LabelledAnswer(Conversation([Q, GOOD], []), good), ())
    assert problem(fields | {name: 3}).rule == "unread-key"
    assert reading(fields | {name: False}, ignore=(name,)) == (Conversation([Q, GOOD], []), (name,))


def test_a_record_of_two_kinds_is_refused() -> None:
    chat = config.ChatRecord(name="chat")
    assert problem(PAIRS[0] | {"messages": [Q]}, chat).rule == problem(LABELLED[2] | {"label": False}, chat).rule == "unread-key"


def test_the_remedy_for_a_pair_works() -> None:
    record = config.CompletionRecord(name="completion", completion="chosen", ignore=("rejected",))
    assert reading(PAIRS[0], record) == (Conversation([Q, GOOD], []), ("rejected",))
    messages = config.ChatRecord(name="chat", column="chosen", ignore=("rejected",))
    assert reading({"chosen": [Q, GOOD], "rejected": [Q, BAD]}, messages).record == Conversation([Q, GOOD], [])


def test_openai_s_request_of_a_pair() -> None:
    request = {"messages": [Q], "tools": [TOOL], "parallel_tool_calls": True}
    pair = {"input": request, "preferred_output": [GOOD], "non_preferred_output": [BAD]}
    expected = PreferencePair(Conversation([Q], [TOOL]), [GOOD], [BAD])
    assert reading(pair) == (expected, ("parallel_tool_calls",))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"chosen": [Q, GOOD], "rejected": [Q, BAD]},
            "no column 'prompt'; the record has 'chosen', 'rejected'; state prompt: null in",
        ),
        (
            {"messages": [Q], "chosen": GOOD, "rejected": BAD},
            'state prompt: "messages" in the record section of a source of such records',
        ),
        (
            {"question": "a", "chosen_response": "b", "rejected_response": "c"},
            'state prompt: "question", chosen: "chosen_response", rejected: "rejected_response" in',
        ),
    ],
)
def test_columns_of_another_layout_are_named_for_the_section(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Problem) as raised:
        normalise(fields, config.PreferenceRecord(name="preference"))
    assert message in str(raised.value)
