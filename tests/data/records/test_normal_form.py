"""Records in the normal form travel between processes unchanged, settings included."""

import pickle

from moe_train.data.records.normal_form import Conversation, LabelledAnswer, ModelSettings, PreferencePair

HELLO = {"role": "user", "content": "Hello"}


def test_records_survive_pickling() -> None:
    conversation = Conversation([HELLO], [], ModelSettings("high", {"type": "json_object"}))
    answer = [{"role": "assistant", "content": "Hi"}]
    for record in (conversation, PreferencePair(conversation, answer, []), LabelledAnswer(conversation, False)):
        assert pickle.loads(pickle.dumps(record)) == record


def test_a_conversation_has_no_settings_unless_stated() -> None:
    assert Conversation([HELLO], []).settings == (None, None)
