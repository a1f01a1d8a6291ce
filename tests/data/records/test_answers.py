"""Which turns of a judged conversation bear loss."""

from __future__ import annotations

from moe_train.data.records.answers import conversations_of, judged_conversations, judged_messages
from moe_train.data.records.normal_form import Conversation, LabelledAnswer, PreferencePair

Q = {"role": "user", "content": "Q"}
A = {"role": "assistant", "content": "A"}
B = {"role": "assistant", "content": "B"}
SILENT = A | {"weight": 0}


def test_turns_of_the_prompt_bear_no_loss_and_those_of_answers_do() -> None:
    pair = PreferencePair(Conversation([Q, A, Q], []), [B, Q, B], [A])
    assert [c.messages for c in judged_conversations(pair)] == [[Q, SILENT, Q, B, Q, B], [Q, SILENT, Q, A]]
    assert [name for name, _ in conversations_of(pair)] == ["chosen", "rejected"]


def test_a_label_judges_what_follows_the_last_question() -> None:
    result = {"role": "tool", "content": "5"}
    answer = LabelledAnswer(Conversation([Q, A, Q, A, result, B], []), good=True)
    assert judged_messages(answer) == [A, result, B]
    [judged] = judged_conversations(answer)
    assert judged.messages == [Q, SILENT, Q, A, result, B]
    assert judged_conversations("text") == [] and judged_conversations(judged) == [judged]
