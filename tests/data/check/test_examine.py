"""What is found in records: the tokens of training, and kinds of records that the tokenizer cannot express."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from moe_train.data.chat.conversation_to_tokens import examples
from moe_train.data.check.examine import examine
from moe_train.data.check.findings import Chunk, Question
from moe_train.data.check.requirements import requirements_of
from moe_train.data.records.conversation import normalise
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.recognise import recognise
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral
from tests.data.chat.chats import CHATML
from tests.data.check.samples import CHAT, KINDS, WITH_TOOLS, Write, check_files
from tests.data.hugging_face import DATA


def test_tokens_are_those_of_training(tokenizer: HuggingFace, v3: Mistral, write_lines: Write) -> None:
    for one, records in ((tokenizer, KINDS), (v3, [*KINDS, WITH_TOOLS])):
        tokens = loss = 0
        lengths = []
        for record in records:
            read = normalise(record, recognise(record))
            if isinstance(read, Conversation):
                expected = examples(read, one.chat_template, one)
                loss += sum(sum(example.loss_mask[1:]) for example in expected)
                lengths += [len(example.tokens) for example in expected]
            else:
                lengths.append(1 + len(one.encode(read)) + 1)  # bos, eos
                loss += lengths[-1] - 1
        tokens = sum(lengths)
        answer = check_files(one, write_lines("a.jsonl", records))
        assert (answer["examples"], answer["tokens"], answer["loss_tokens"]) == (len(lengths), tokens, loss)
        assert answer["lengths"]["max"] == max(lengths)
        bins = collections.Counter(max(1, 2 ** int(np.ceil(np.log2(n)))) for n in lengths)
        assert {b["up_to"]: b["examples"] for b in answer["lengths"]["histogram"] if b["examples"]} == bins


def test_tools_under_a_tokenizer_without_tool_tokens(tokenizer: HuggingFace, v3: Mistral, write_lines: Write) -> None:
    path = write_lines("a.jsonl", [CHAT, WITH_TOOLS, WITH_TOOLS | {"id": 2}, CHAT])
    answer = check_files(v3, path)
    assert answer["problems"] == [] and answer["shapes"] == {"chat": 2, "chat with tools": 2} and answer["examples"] == 6
    v1 = Mistral(DATA / "tokenizer.model.v1")
    for without, template, remedy in ((v1, None, "moe-train extend-vocab"), (tokenizer, CHATML, "--chat-template")):
        answer = check_files(without, path, template=template)
        assert answer["problem_counts"] == {"tools": 2} and answer["examples"] == 2
        assert all(remedy in problem["remedy"] for problem in answer["problems"])
        assert ("extend-vocab" in answer["problems"][0]["remedy"]) == (without is v1)


def test_conversations_without_a_template(tokenizer: HuggingFace, write_lines: Write) -> None:
    answer = check_files(tokenizer, write_lines("a.jsonl", [CHAT, CHAT]), template=None)
    assert answer["problem_counts"] == {"no-template": 2} and answer["examples"] == 0
    assert "has no chat template" in answer["problems"][0]["message"] and "--chat-template" in answer["problems"][0]["remedy"]


def test_a_chunk_of_rows(tokenizer: HuggingFace) -> None:
    question = Question((None,), tokenizer, tokenizer.chat_template, repairing=True)
    rows = [(1, {"text": "a"}), (2, {"text": "b\0"}), (5, {"body": "c"}), (6, CHAT)]
    findings = examine(Chunk(0, rows), question, requirements_of(tokenizer, tokenizer.chat_template))
    assert (findings.num_records, findings.numbers.tolist()) == (4, [1, 2, 6])
    assert findings.shapes == {"text": 2, "chat": 1}
    assert [(number, problem.rule) for number, problem in findings.problems] == [(2, "unicode"), (5, "columns")]
    assert findings.corrected is not None and findings.corrected.num_records == 3
    assert [(change.number, change.action) for change in findings.corrected.changes] == [(2, "changed"), (5, "dropped")]


def test_a_value_without_json_cannot_be_kept(tokenizer: HuggingFace) -> None:
    question = Question((None,), tokenizer, None, repairing=True)
    with pytest.raises(ValueError, match=r"a column cannot be written as JSON \(.*set.*\); leave it out of the file"):
        examine(Chunk(0, [(1, {"text": "a", "tags": {1}})]), question, requirements_of(tokenizer, None))


def test_a_text_that_the_tokenizer_refuses_is_a_problem_of_its_own(mistral: Mistral, write_lines: Write) -> None:
    path = write_lines("a.jsonl", [{"text": "a"}, {"text": " " * 1_100_000 + "a"}, {"text": "b"}])
    answer = check_files(mistral, path)
    assert answer["problem_counts"] == {"stretch": 1} and answer["examples"] == 2
    assert answer["problems"][0]["where"] == f"{path}:2" and "the text has 1,100,001 characters" in answer["problems"][0]["message"]
