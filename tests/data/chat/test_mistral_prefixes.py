"""Prefixes have the tokens that mistral-common gives them alone, and each text is tokenized once."""

from __future__ import annotations

import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest

from moe_train.data.chat.conversation_to_tokens import examples
from moe_train.data.chat.example import turns
from moe_train.data.chat.mistral_prefixes import Prefixes
from tests.data.chat.test_mistral import both
from tests.data.chat.trajectories import agent, asked, called, conversation, said

MADE = conversation(asked(), called(0, 2), called(1), said(), asked("And now?"), called(2), said("Done."))


@pytest.mark.parametrize("version", ["v3", "v7", "tekken", "small-v11", "small-v13"])
def test_tokens_and_spans_are_mistral_commons(version: str) -> None:
    _, theirs = both(version)
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in MADE.messages]
    request = ChatCompletionRequest.model_validate({"messages": plain, "tools": MADE.tools})
    encoder = theirs.instruct_tokenizer
    prefixes = Prefixes(request, theirs._instruct_request_normalizer, encoder, theirs.version >= "v13")  # type: ignore[arg-type]
    for number, turn in enumerate(turns(MADE.messages)):
        prefix = ChatCompletionRequest.model_validate({"messages": plain[: turn.end], "tools": MADE.tools})
        normal = theirs._instruct_request_normalizer.from_chat_completion_request(prefix)
        tokens, (span,), _ = prefixes.encode(range(number, number + 1), turn.end)
        assert tokens == encoder.encode_instruct(normal).tokens
        before = ChatCompletionRequest.model_validate({"messages": plain[: turn.start], "tools": MADE.tools})
        prompt = theirs._instruct_request_normalizer.from_chat_completion_request(before)
        assert tokens[: span.start] == encoder.encode_instruct(prompt).tokens and span.end == len(tokens)
        text = encoder.decode(span.generated)
        assert f"call00{number}" not in text
        assert (span.generated == tokens[span.start :]) == (theirs.version >= "v13" or "tool_calls" not in plain[turn.start])


def test_no_text_is_tokenized_again_for_a_later_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, _ = both("v3")
    text_tokenizer = tokenizer.finetuning.instruct_tokenizer.tokenizer
    encode = text_tokenizer.encode
    counts = []
    for num_calls in (20, 40):
        counts.append(0)

        def counted(text: str, bos: bool, eos: bool) -> list[int]:
            counts[-1] += len(text)
            return encode(text, bos, eos)

        monkeypatch.setattr(text_tokenizer, "encode", counted)
        examples(agent(num_calls), None, tokenizer)
    assert counts[1] < 2.1 * counts[0]
