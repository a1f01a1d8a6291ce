"""What is checked of preference pairs and labelled answers."""

from __future__ import annotations

from typing import Any

import pytest

from moe_train.data.check.rules import problems
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.check.broken_records import FORM
from tests.data.check.samples import Write, check_files
from tests.data.records.reading import reading

Q = {"role": "user", "content": "Name a red fruit."}
GOOD = {"role": "assistant", "content": "Cherry."}
BAD = {"role": "assistant", "content": "Stone."}


@pytest.mark.parametrize(
    ("fields", "rules"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, []),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, ["pair"]),
        ({"prompt": "a", "chosen": "b", "rejected": " b\n"}, ["pair"]),
        ({"chosen": [Q, GOOD], "rejected": [Q, GOOD]}, ["pair"]),
        ({"chosen": "b", "rejected": "b", "prompt": "a"}, ["pair"]),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, ["empty-assistant"]),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, ["empty-assistant"]),
        ({"prompt": [Q], "chosen": [Q], "rejected": [Q, BAD]}, ["pair", "last-turn"]),
        ({"prompt": [Q], "chosen": [GOOD, Q], "rejected": [BAD]}, ["last-turn"]),
        ({"prompt": [Q | {"role": "narrator"}], "chosen": [GOOD], "rejected": [BAD]}, ["role"]),  # once, though both have it
        ({"prompt": "a", "completion": "b", "label": False}, []),
        ({"prompt": "a", "completion": "", "label": True}, ["empty-assistant"]),
        ({"messages": [Q, GOOD, Q], "label": True}, ["last-turn"]),
    ],
)
def test_pairs(fields: dict[str, Any], rules: list[str]) -> None:
    broken = [problem.rule for problem in problems(reading(fields).record, FORM)]
    assert [rule for rule in broken if rule != "no-loss"] == rules


def test_pairs_are_counted_and_tokenized(tokenizer: HuggingFace, write_lines: Write) -> None:
    pairs = [{"prompt": f"a{n}", "chosen": "b", "rejected": "c"} for n in range(3)]
    answer = check_files(tokenizer, write_lines("a.jsonl", pairs))
    assert answer["shapes"] == {"preference": 3} and answer["problems"] == [] and answer["examples"] == 3
    labelled = [{"prompt": f"a{label}", "completion": "b", "label": label} for label in (True, False)]
    answer = check_files(tokenizer, write_lines("c.jsonl", labelled))
    assert answer["shapes"] == {"labelled": 2} and answer["problems"] == [] and answer["examples"] == 2
