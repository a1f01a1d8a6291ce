"""Partners of labelled answers: the nearest earlier record with another prompt."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_train.data.batches.mismatched import check_labels, partners, unpaired_lengths


def store(prompts: str, labels: str = "", prompt_tokens: int = 3) -> Any:
    """A store with one example for each letter of `prompts`; example i has i + 2 ids of answer."""
    rows = []
    for i, letter in enumerate(prompts):
        rows.append([float((labels or "10" * len(prompts))[i] == "1"), ord(letter), prompt_tokens, prompt_tokens + i + 2])
    return SimpleNamespace(values=np.array(rows), where=lambda i: f"a.jsonl:{i + 1}")


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [("abc", [2, 0, 1]), ("aabb", [3, 3, 1, 1]), ("abba", [2, 0, 0, 2]), ("aaab", [3, 3, 3, 2]), ("ba", [1, 0])],
)
def test_the_partner_is_the_nearest_record_before_with_another_prompt(prompts: str, expected: list[int]) -> None:
    assert partners(store(prompts)).tolist() == expected


def test_a_mismatched_segment_is_the_own_prompt_with_the_answer_of_the_partner() -> None:
    opened = store("abc")
    # Alone 3 + 2 - 1 = 4 positions; with the answer of the last record, 3 + 4 - 1 more.
    assert unpaired_lengths(opened, np.array([4, 5, 0]), partners(opened)).tolist() == [4 + 6, 5 + 4, 0]


def test_one_prompt_or_one_label_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^a\.jsonl:1: all 3 answers of the set have the same prompt"):
        partners(store("aaa"))
    check_labels([store("ab", "11"), store("cd", "00")])
    with pytest.raises(ValueError, match=r"^a\.jsonl:1: .*labelled bad.*add records with the label true"):
        check_labels([store("ab", "00"), store("cd", "00")])
