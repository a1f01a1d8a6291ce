"""What the graded answers to a question become."""

from __future__ import annotations

import re

import pytest

from moe_train.evaluate.suites.answer import Answer
from moe_train.evaluate.suites.items import SuiteItem
from moe_train.evaluate.synthesis import AnswerCounts, SampledAnswer, records_of, sort_answers, turn_of

QUESTION = [{"role": "user", "content": "1 + 1?"}]
ITEM = SuiteItem("a", "items.jsonl:1", QUESTION, [], ("2",))
GIVEN = [("3", 0.0, True), (" 2", 1.0, True), ("2", 1.0, True), ("two", 0.5, True), ("", 0.0, True), ("2 2 2", 1.0, False)]
ANSWERS = [SampledAnswer(i, Answer(ITEM, text, score, ended), turn_of(text, text)) for i, (text, score, ended) in enumerate(GIVEN)]
ANSWERS.append(SampledAnswer(6, Answer(ITEM, "?", None, True, problem="items.jsonl:1: no judge"), turn_of("?", "?")))
ANSWERS.append(SampledAnswer(7, Answer(ITEM, "2", 1.0, True), turn_of("2[INST]", "2")))
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "fox"}}}


def test_what_is_left_out() -> None:
    graded = sort_answers(ANSWERS, 1.0)
    assert graded.counts == AnswerCounts(accepted=1, rejected=2, repeated=1, unfinished=1, empty=1, not_written=1, not_graded=1)
    assert sum(graded.counts) == len(ANSWERS)
    assert [sampled.sample for sampled in graded.accepted] == [1]
    assert [sampled.sample for sampled in graded.rejected] == [3, 0], "the better one first"


@pytest.mark.parametrize(
    ("form", "texts"),
    [("sft", [["2"], ["two"]]), ("pairs", [["2", "3"]]), ("kto", [["2"], ["two"], ["3"]])],
)
def test_records(form: str, texts: list[list[str]]) -> None:
    """With a lower threshold, the better of two accepted answers is set against the rejected one."""
    records = records_of(form, QUESTION, [], sort_answers(ANSWERS, 0.5))  # type: ignore[arg-type]
    assert [[source.answer.text.strip() for source in record.sources] for record in records] == texts
    turn = {"role": "assistant", "content": "2"}
    expected = {
        "sft": {"messages": [*QUESTION, turn]},
        "pairs": {"prompt": QUESTION, "chosen": [turn], "rejected": [{"role": "assistant", "content": "3"}]},
        "kto": {"prompt": QUESTION, "completion": [turn], "label": True},
    }
    assert records[0].fields == expected[form]


@pytest.mark.parametrize(
    ("text", "turn"),
    [
        (" 2 ", {"content": "2"}),
        ('{"name": "look", "arguments": {}}', {"content": '{"name": "look", "arguments": {}}'}),
        ('Well. [TOOL_CALLS][{"name": "look", "arguments": {"at": "fox"}}]', {"content": "Well.", "tool_calls": [CALL]}),
        ('[TOOL_CALLS]look[ARGS]{"at": "fox"}[TOOL_CALLS]look[CALL_ID]123456789[ARGS]{"at": "fox"}', {"tool_calls": [CALL, CALL]}),
        ('<tool_call>\n{"name": "look", "arguments": {"at": "fox"}}\n</tool_call>\n', {"tool_calls": [CALL]}),
        ('<tool_call>{"name": "look", "arguments": {"at": "fox"}}</tool_call> done', None),
        ('<tool_call>{"name": "look", "arguments": {"at": "fox"}}', None),
        ("[TOOL_CALLS][{]", None),
        ("[TOOL_CALLS][]", None),
        ('[INST][TOOL_CALLS]look[ARGS]{"at": "fox"}', None),
        ('[TOOL_CALLS]look[ARGS]{"at": "fox"}[INST]', None),
        ("[THINK]so[/THINK]2", None),
    ],
)
def test_turns(text: str, turn: dict[str, object] | None) -> None:
    plain = re.sub(r"\[[A-Z_/]+\]", "", text)
    assert turn_of(text, plain) == (None if turn is None else {"role": "assistant", "content": "", **turn})
