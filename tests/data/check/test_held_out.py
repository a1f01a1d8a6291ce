"""The evaluation set of a check: which of its records were met, and errors that name the record."""

from __future__ import annotations

import numpy as np
import pytest

from moe_train.data.check.held_out import HeldOutRecords
from moe_train.data.check.sources import CheckedSource
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.check.samples import CHAT, Write, check_files


def test_each_record_that_was_met_counts_once(write_lines: Write) -> None:
    records = [{"text": " ".join(f"{name}{n}" for n in range(14))} for name in "ab"]
    held_out = HeldOutRecords((CheckedSource((str(write_lines("eval.jsonl", [records[0], *records])),)),))
    assert held_out.hashes is not None and held_out.num_records == 3 and held_out.num_hit == 0
    assert held_out.hashes.tolist() == sorted(set(held_out.hashes.tolist())) and len(held_out.hashes) == 4
    held_out.add(np.arange(4))
    assert held_out.num_hit == 3


def test_without_an_evaluation_set_there_is_nothing_to_compare_with() -> None:
    assert HeldOutRecords(()).hashes is None


def test_an_empty_evaluation_set_is_refused(write_lines: Write) -> None:
    with pytest.raises(ValueError, match="the evaluation set has no records to compare with"):
        HeldOutRecords((CheckedSource((str(write_lines("eval.jsonl", [])),)),))


def test_a_record_that_cannot_be_read_is_named(tokenizer: HuggingFace, write_lines: Write) -> None:
    bad = write_lines("bad.jsonl", [{"x": 1}])
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: no column"):
        check_files(tokenizer, write_lines("a.jsonl", [CHAT]), against=(CheckedSource((str(bad),)),))
