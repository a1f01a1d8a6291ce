"""Word sequences that records share with an evaluation set."""

from __future__ import annotations

import numpy as np

from moe_train.data.check.ngrams import words
from moe_train.data.check.overlap import OVERLAP_WORDS, compared_text, held_out_hashes, overlap
from moe_train.data.check.sources import CheckedSource
from moe_train.data.records.normal_form import Conversation
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.check.samples import ANSWER, USER, Write, check_files


def test_duplicates_and_overlap(tokenizer: HuggingFace, write_lines: Write) -> None:
    words = [f"w{n}" for n in range(400)]
    story = " ".join(words[:200])
    later_story = " ".join(words[200:])
    near = story.replace("w100 ", "changed ").upper()
    system = {"role": "system", "content": " ".join(words)}  # that two records share it makes them no twins
    chats = [{"messages": [system, USER | {"content": f"Question {n}?"}, ANSWER | {"content": str(n)}]} for n in range(3)]
    path = write_lines("a.jsonl", [{"text": story}, {"text": later_story}, {"text": near}, {"text": later_story}, *chats])
    held_out = write_lines(
        "eval.jsonl",
        [
            {"question": "Who? " + " ".join(words[250:263]), "answer": "No one."},
            {"text": "too short a text"},
            {"text": "unseen " * 30},
        ],
    )
    answer = check_files(tokenizer, path, against=(CheckedSource((str(held_out),)),))
    assert (answer["duplicates"]["exact"], answer["duplicates"]["near"]) == (1, 1)
    assert [(twin["where"], twin["like"]) for twin in answer["duplicates"]["examples"]] == [
        (f"{path}:4", f"{path}:2"),
        (f"{path}:3", f"{path}:1"),
    ]
    assert answer["overlap"] == {
        "records": 2,
        "evaluation_records": 1,
        "of": 3,
        "words": 13,
        "examples": [f"{path}:2", f"{path}:4"],
    }
    one_word_less = write_lines("less.jsonl", [{"text": " ".join(words[250:262]) + " and so on"}])
    assert check_files(tokenizer, path, against=(CheckedSource((str(one_word_less),)),))["overlap"]["records"] == 0


def test_a_system_text_does_not_tell_a_conversation_from_others() -> None:
    call = {"function": {"name": "add", "arguments": "{}"}}
    messages = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "tool_calls": [call]}]
    assert compared_text(Conversation(messages, [])) == 'What is 2 + 3?\n{"function": {"name": "add", "arguments": "{}"}}'
    assert compared_text("plain text") == "plain text"


def test_only_whole_sequences_are_an_overlap() -> None:
    text = " ".join(f"w{n}" for n in range(OVERLAP_WORDS))
    hashes, record = held_out_hashes([text, "other words"])
    texts = words([f"before {text} after", text.rpartition(" ")[0], text.upper()])
    overlapping, places = overlap(texts, np.sort(hashes))
    assert overlapping.tolist() == [0, 2] and len(places) == 1 and record.tolist() == [0, 1]
    assert [len(indices) for indices in overlap(texts, None)] == [0, 0]
