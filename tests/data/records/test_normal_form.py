"""Records in the normal form travel between processes unchanged, settings included."""

import pickle

from moe_train.data.records.normal_form import (
    Conversation,
    LabelledAnswer,
    ModelSettings,
    PreferencePair,
    joined_texts,
    reasoning_of,
)

HELLO = {"role": "user", "content": "Hello"}


def test_records_survive_pickling() -> None:
    conversation = Conversation([HELLO], [], ModelSettings("high", {"type": "json_object"}))
    answer = [{"role": "assistant", "content": "Hi"}]
    for record in (conversation, PreferencePair(conversation, answer, []), LabelledAnswer(conversation, False)):
        assert pickle.loads(pickle.dumps(record)) == record


def test_a_conversation_has_no_settings_unless_stated() -> None:
    assert Conversation([HELLO], []).settings == (None, None, None)


def test_texts_and_reasoning_of_a_message() -> None:
    texts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    thought = {"type": "thinking", "thinking": "So."}
    assert joined_texts(HELLO) == "Hello" and reasoning_of(HELLO) == []
    assert joined_texts({"role": "user", "content": texts}) == "a\n\nb"
    assert joined_texts({"role": "user", "content": texts}, "") == "ab"
    thinking = {"role": "assistant", "content": [thought, *texts]}
    assert joined_texts(thinking) is None and reasoning_of(thinking) == ["So."]
    assert joined_texts({"role": "assistant", "tool_calls": []}) is None
