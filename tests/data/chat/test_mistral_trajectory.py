"""The turns of a conversation with tools share examples without a change of what is trained on, at a linear number of tokens."""

from __future__ import annotations

import re

import pytest

from moe_train.data.chat import mistral, mistral_trajectory
from moe_train.data.chat.conversation_to_tokens import examples
from moe_train.data.chat.example import NEW_USER_TURN, REWRITTEN, WITHOUT_ID, Example
from moe_train.data.chat.mistral_prefixes import EncodedPrefix, TurnSpan
from moe_train.data.chat.mistral_trajectory import merged_examples
from moe_train.data.records.normal_form import Conversation
from moe_train.data.tokenizers.mistral import Mistral
from tests.data.chat.test_mistral import both
from tests.data.chat.trajectories import agent, asked, called, conversation, predictions, said, separate, trained_ids

WITH_IDS = ("v3", "v7", "tekken", "small-v11")
WITHOUT_IDS = ("v2", "small-v13")
MIXED = {
    "a chain": agent(5),
    "parallel calls": conversation(asked(), called(0, 3), called(1, 2), said()),
    "results in another order": conversation(asked(), called(0, 3, backwards=True), called(1, 2, backwards=True), said()),
    "very long results": agent(3, result="0123456789 " * 3000),
    "turns of weight 0": conversation(asked(), called(0), called(1, weight=0), called(2), said(weight=0), asked("More?"), said()),
    "several user turns": conversation(
        asked(), called(0), said(), asked("And now?"), called(1), called(2), said(), asked("?"), said()
    ),
    "only calls": conversation(asked(), called(0), called(1)[:1]),
    "system": conversation([{"role": "system", "content": "Be brief."}], asked(), called(0), said(), asked("?"), called(1), said()),
}


def merged(made: Conversation, tokenizer: Mistral) -> list[Example]:
    return examples(made, None, tokenizer)


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("version", WITHOUT_IDS)
def test_every_prediction_is_that_of_an_example_for_each_turn(version: str, kind: str) -> None:
    tokenizer, _ = both(version)
    made = MIXED[kind]
    if version == "v2" and any(len(message.get("tool_calls", ())) > 1 for message in made.messages):
        return  # v2 has no results of parallel calls
    rows = merged(made, tokenizer)
    assert predictions(rows) == predictions(separate(made, None, tokenizer))


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("version", WITH_IDS)
def test_where_calls_have_ids_later_only_their_ends_differ(version: str, kind: str) -> None:
    tokenizer, _ = both(version)
    made = MIXED[kind]
    rows = merged(made, tokenizer)
    found = predictions(rows)
    num_exact_calls = 0
    for example in separate(made, None, tokenizer):
        missing = predictions([example]) - found
        if "[TOOL_CALLS]" in tokenizer.decode(trained_ids(example), keep_special=True):
            num_exact_calls += not missing
            assert missing.total() < len(trained_ids(example))  # at least the beginning is there
        else:
            assert not missing
    assert num_exact_calls >= 1
    assert not any(re.search(r"call\d{5}", tokenizer.decode(trained_ids(row))) for row in rows)


@pytest.mark.parametrize("version", [*WITH_IDS, *WITHOUT_IDS])
def test_the_tokens_are_those_of_the_longest_prefix(version: str) -> None:
    tokenizer, _ = both(version)
    made = agent(20)
    *call, row = merged(made, tokenizer)
    assert row.merged is not None and len(row.merged.ends) == 21 - len(call)
    # All tokens before the last turn are what a server sends for it.
    prompt = mistral.prompt(Conversation(made.messages[:-1], made.tools), tokenizer).tokens
    assert row.tokens[: len(prompt)] == prompt
    assert row.merged.separate_tokens > 9 * len(row.tokens)
    assert row.merged.restart == (WITHOUT_ID if version in WITH_IDS else None)
    assert sum(len(example.tokens) for example in call) < len(row.tokens) / 5


def test_a_row_ends_with_a_call_as_it_is_generated() -> None:
    tokenizer, _ = both("v3")
    (row,) = merged(MIXED["only calls"], tokenizer)
    text = tokenizer.decode(row.tokens, keep_special=True).replace("▁", " ")
    assert text.count('"id"') == 1 and text.endswith('"cwd": null}}]</s>')


def test_a_new_user_turn_begins_a_new_example_where_it_moves_the_tools() -> None:
    made = MIXED["several user turns"]
    for version, restarts in (("v3", [None, WITHOUT_ID, NEW_USER_TURN, NEW_USER_TURN]), ("small-v13", [None])):
        rows = merged(made, both(version)[0])
        assert [row.merged.restart for row in rows if row.merged] == restarts
    tokenizer, _ = both("v3")
    no_tools = Conversation(made.messages, [])
    assert [row.merged.restart for row in merged(no_tools, tokenizer) if row.merged] == [None, WITHOUT_ID]


def test_tokens_decide() -> None:
    """An encoding that changes earlier tokens begins a new example, though no user turn lies between."""

    class Fickle:
        def encode(self, numbers: range, end: int) -> EncodedPrefix:
            first = 7 if numbers.start == 2 else 1
            tokens = [first, *range(2, 3 + numbers.stop)]
            return EncodedPrefix(tokens, [TurnSpan(len(tokens) - 1, len(tokens), tokens[-1:])], ())

    rows = merged_examples(agent(3).messages, Fickle(), both("v3")[0])  # type: ignore[arg-type]
    assert [row.merged.restart for row in rows if row.merged] == [None, REWRITTEN, REWRITTEN]
    assert [row.merged.ends for row in rows if row.merged] == [(3, 4), (5,), (6,)]


@pytest.mark.parametrize("version", ["v3", "small-v13"])
def test_long_conversations_are_compared_at_fewer_places(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, _ = both(version)
    made = conversation(asked(), *(called(i, weight=i % 5 != 3) for i in range(30)), said(), asked("?"), called(30), said())
    everywhere = merged(made, tokenizer)
    monkeypatch.setattr(mistral_trajectory, "_MOST_ENCODED", 4)
    assert merged(made, tokenizer) == everywhere
