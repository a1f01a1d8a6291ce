"""A Hugging Face tokenizer with its chat template gives mistral-common's tokens; hostile templates are stopped."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from mistral_common.protocol.instruct.request import ChatCompletionRequest

from moe_train.data import chat
from moe_train.data import template as templates
from moe_train.data.conversation import Conversation
from moe_train.data.example import Example, turns
from moe_train.data.fields import Problem
from moe_train.data.tokenizer import HuggingFace, Mistral
from tests.data.conversations import conversations, texts
from tests.data.hugging_face import DATA, small_tekken, write

FILES = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
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
        learnt = [turn for turn in turns(conversation.messages) if turn.bears_loss]
        found = chat.examples(conversation, ours.chat_template, ours)
        for i, (example, expected) in enumerate(zip(found, chat.examples(conversation, None, theirs), strict=True)):
            last = conversation.messages[learnt[i].end - 1]
            if tools and "tool_calls" in last and version != "tekken-v13":
                compare_call(example, Conversation(conversation.messages[: learnt[i].end], conversation.tools), ours, theirs)
            else:
                assert example == expected
        seen.add(json.dumps(record))
        count += len(found)

    compare()
    assert len(seen) >= wanted
    return count


def compare_call(example: Example, conversation: Conversation, ours: HuggingFace, theirs: Mistral) -> None:
    """The template insists on ids, which mistral-common's fine-tuning leaves out: they are there, and not learnt."""
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in conversation.messages]
    request = ChatCompletionRequest.model_validate({"messages": plain, "tools": conversation.tools})
    assert example.tokens == theirs.finetuning.encode_chat_completion(request).tokens
    start = len(templates.prompt(Conversation(plain[:-1], conversation.tools), str(ours.chat_template), ours))
    assert example.loss_mask is not None and not any(example.loss_mask[:start])
    turn = list(zip(example.tokens[start:], example.loss_mask[start:], strict=True))
    left_out = ours.decode([token for token, learnt in turn if not learnt])
    ids = [] if ours.files[0].parent.name == "v2" else [call["id"] for call in plain[-1]["tool_calls"]]
    assert re.sub(r"[^a-zA-Z0-9]", "", left_out) == "".join(ids)
    assert example.loss_mask[-1]


@pytest.mark.parametrize("tools", [False, True])
def test_the_tokens_are_mistral_commons(pair: tuple[str, HuggingFace, Mistral], tools: bool) -> None:
    if pair[0] == "v1" and tools:
        with pytest.raises(Problem, match=r"the chat template .*; versions v2, v3"):
            chat.check_has_tools(pair[1].chat_template, pair[1])
        return
    check_equal(pair, tools, 10)


@pytest.mark.slow
@pytest.mark.parametrize("tools", [False, True])
def test_the_tokens_are_mistral_commons_over_many_conversations(pair: tuple[str, HuggingFace, Mistral], tools: bool) -> None:
    if pair[0] != "v1" or not tools:
        count = check_equal(pair, tools, 150)
        print(pair[0], "with tools" if tools else "without tools", count, "examples")
