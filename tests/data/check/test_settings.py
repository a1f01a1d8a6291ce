"""The settings of a check: rules that may be broken, and settings that exclude one another."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.data.check.settings import CheckSettings
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.check.samples import Write, check_files


def test_a_rule_may_be_broken_where_that_is_allowed(tokenizer: HuggingFace, write_lines: Write) -> None:
    path = write_lines("a.jsonl", [{"text": "x </s> y"}, {"text": 3}])
    assert check_files(tokenizer, path, allowed=frozenset({"control-token"}))["problem_counts"] == {"type": 1}
    with pytest.raises(ValueError, match=r"there is no rule control; the rules are .*control-token"):
        check_files(tokenizer, path, allowed=frozenset({"control"}))


@pytest.mark.parametrize(("settings", "option"), [({"dry_run": True}, "--dry-run"), ({"fix": Path("out")}, "--fix")])
def test_a_sample_is_not_corrected(settings: dict[str, object], option: str) -> None:
    with pytest.raises(ValueError, match=f"a sample cannot be fixed: leave out --sample or {option}"):
        CheckSettings(sample=5, **settings).validate()
