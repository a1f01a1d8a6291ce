"""Candidates as servers write them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from moe_train.data.prepared.teacher_files import _candidates, _prompt_logprobs

PAIRS = [(7, -0.5), (9, -1.5)]


@pytest.mark.parametrize(
    "entry",
    [
        {"7": {"logprob": -0.5, "rank": 1, "decoded_token": "a"}, "9": {"logprob": -1.5}},
        {"7": -0.5, "9": -1.5},
        [{"token": "token_id:7", "logprob": -0.5}, {"token": "token_id:9", "logprob": -1.5}],
        [[7, -0.5], [9, -1.5]],
    ],
)
def test_forms_of_candidates(entry: Any) -> None:
    assert _candidates("f:1", entry) == PAIRS


@pytest.mark.parametrize("entry", [{"the": -0.5}, {"7": 0.5}, {"7": None}, [7], [[7, True]], {}, "x"])
def test_what_is_no_candidate(entry: Any) -> None:
    with pytest.raises(ValueError, match=r"^f:1: ") as refused:
        _candidates("f:1", entry)
    assert re.search("write", str(refused.value)) and "\n" not in str(refused.value)


def test_responses() -> None:
    assert _prompt_logprobs("f:1", {"choices": [{"prompt_logprobs": [None]}]}) == [None]
    with pytest.raises(ValueError, match="f:1: there is no list prompt_logprobs"):
        _prompt_logprobs("f:1", {"choices": []})
