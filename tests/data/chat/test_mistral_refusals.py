"""What mistral-common refuses is a problem with the message at fault, and what the remedy says is accepted."""

from __future__ import annotations

from typing import Any

import pytest
from mistral_common.exceptions import MistralCommonException

from moe_train.data.chat import mistral
from moe_train.data.chat.mistral_refusals import refusal
from moe_train.data.records.normal_form import Conversation, Message, ModelSettings
from moe_train.data.records.problem import Problem
from tests.data.chat.test_mistral import both
from tests.data.chat.trajectories import TOOL, asked, called, said

CALL = called(0)
TEXT_AND_CALL = [{**CALL[0], "content": "Let me see."}, CALL[1]]
PAIR = called(0, 2)
TWINS = [{**CALL[0], "tool_calls": CALL[0]["tool_calls"] * 2}, CALL[1], CALL[1]]
ANSWERED = [*asked(), *CALL, *said()]
SPOKEN = [*asked(), *said()]
BAD_TOOL = {"type": "function", "function": {"name": "bash", "parameters": {"type": "no such type"}}}
BAD_NAME = {"type": "function", "function": {"name": "to bash", "parameters": {}}}


def with_id(messages: list[Message], name: str | None) -> list[Message]:
    """The messages with another id of the call, in the call and in its result."""
    call = {key: value for key, value in messages[0]["tool_calls"][0].items() if key != "id"}
    return [{**messages[0], "tool_calls": [call | ({"id": name} if name else {})]}, {**messages[1], "tool_call_id": name or ""}]


CASES: list[tuple[str, list[Message], str, str, list[Message]]] = [
    (
        "v3",
        [*asked(), *TEXT_AND_CALL, *said()],
        "text-and-call",
        "message 1 has text beside the calls, which",
        ANSWERED,
    ),
    (
        "v1",
        [*asked(), *said(""), *asked(), *said()],
        "empty-assistant",
        "message 1 is a turn .* without text or calls",
        [*asked(), *said()],
    ),
    ("v7", [*asked(), *said(), *called(0), *said()], "", "", []),
    (
        "v2",
        [*asked(), *said(), *CALL, *said()],
        "text-and-call",
        "message 1 has text beside the calls of message 2, which is one turn with it",
        ANSWERED,
    ),
    (
        "v3",
        [*asked(), *with_id(CALL, "call_1"), *said()],
        "call-id",
        "message 1 calls bash with the id 'call_1'",
        ANSWERED,
    ),
    (
        "v3",
        [*asked(), *with_id(CALL, None), *said()],
        "call-id",
        "message 1 calls bash with the id None",
        ANSWERED,
    ),
    ("v13", [*asked(), *with_id(CALL, None), *said()], "call-result", "message 1", [*asked(), *with_id(CALL, "call_1"), *said()]),
    (
        "v3",
        [*asked(), CALL[0], *said()],
        "call-result",
        r"message 1 has 1 calls \(call00000\) and 0 results",
        ANSWERED,
    ),
    ("v11", [*asked(), *PAIR[:2], PAIR[1], *said()], "call-result", "message 1 has 2 calls", [*asked(), *PAIR, *said()]),
    ("v2", [*asked(), *PAIR, *said()], "call-result", "message 1 has 2 results", ANSWERED),
    ("v3", [*asked(), CALL[1], *said()], "role-order", "message 1 is tool after user", ANSWERED),
    ("v3", said(), "role-order", "message 0 is assistant, where user or system", SPOKEN),
    ("v3", [CALL[1], CALL[1], *said()], "role-order", "message 0 is tool, where user or system", SPOKEN),
    ("v11", [CALL[1], CALL[1], *said()], "role-order", "message 0 is tool, where user or system", SPOKEN),
    ("v11", [*asked(), *TWINS, *said()], "call-id", "message 1 has 2 calls with the id 'call00000'", [*asked(), *PAIR, *said()]),
]


@pytest.mark.parametrize(("version", "messages", "rule", "message", "remedied"), CASES)
def test_the_place_at_fault_and_what_is_accepted_instead(
    version: str, messages: list[Message], rule: str, message: str, remedied: list[Message]
) -> None:
    tokenizer, _ = both(version)
    tools = [TOOL] if version != "v1" else []
    if not rule:
        assert mistral.examples(Conversation(messages, tools), tokenizer)
        return
    with pytest.raises(Problem, match=message) as caught:
        mistral.examples(Conversation(messages, tools), tokenizer)
    assert caught.value.rule == rule and "\n" not in str(caught.value) and "mistral-common" not in str(caught.value)
    assert mistral.examples(Conversation(remedied, tools), tokenizer)


@pytest.mark.parametrize(("tool", "rule"), [(BAD_TOOL, "tool-schema"), (BAD_NAME, "function-name")])
def test_tools(tool: dict[str, Any], rule: str) -> None:
    with pytest.raises(Problem) as caught:
        mistral.examples(Conversation(SPOKEN, [tool]), both("v3")[0])
    assert caught.value.rule == rule


def test_text_beside_calls_is_written_by_later_versions() -> None:
    for version in ("v7", "v11", "v13", "v15"):
        assert mistral.examples(Conversation([*asked(), *TEXT_AND_CALL, *said()], [TOOL]), both(version)[0])


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"type": "xml"}, "response_format.type of the record"),
        ({"type": "json_schema"}, "response_format of the record is not accepted: Response format"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}, "response_format.json_schema.schema of"),
    ],
)
def test_settings(settings: dict[str, Any], place: str) -> None:
    conversation = Conversation(SPOKEN, [], ModelSettings(response_format=settings))
    with pytest.raises(Problem, match=place) as caught:
        mistral.examples(conversation, both("small-v15")[0])
    assert caught.value.rule == "settings" and "mistral-common" not in str(caught.value)


class NewRefusal(MistralCommonException):
    """What a later version of mistral-common might raise."""


def test_other_words_for_a_known_fault() -> None:
    conversation = Conversation([*asked(), CALL[1], *said()], [TOOL])
    problem = refusal(NewRefusal("the roles are wrong"), conversation, both("v3")[0])
    assert (
        problem.rule == "role-order" and "message 1 is tool after user" in problem.message and "roles are wrong" in problem.message
    )
    assert refusal(NewRefusal("no reason"), Conversation(SPOKEN, []), both("v3")[0]).rule == "refused"


@pytest.mark.parametrize("version", ["v7", "v11", "v13"])
def test_a_conversation_may_begin_with_the_assistant(version: str) -> None:
    ours, _ = both(version)
    (example,) = mistral.examples(Conversation([*said("Hello."), *asked(), *said()], []), ours)
    assert example.loss_mask is not None and example.loss_mask[:2] == [False, True]
