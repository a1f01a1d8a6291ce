"""What training on the records takes: rows, steps and seconds, from the plan that training itself packs by."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from moe_train import config
from moe_train.data.batches.packing import make_plan
from moe_train.data.chat.conversation_to_tokens import examples
from moe_train.data.check.estimate import epoch, histogram, truncation
from moe_train.data.check.sources import CheckedSource
from moe_train.data.records.conversation import normalise
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.check.samples import ANSWER, KINDS, USER, Write, check_files


def test_packing_is_that_of_training(tokenizer: HuggingFace, write_lines: Write, tmp_path: Path) -> None:
    texts = [{"text": "word " * (1 + 37 * n % 90)} for n in range(60)]
    turns = [{"messages": [USER, ANSWER | {"content": "It is so. " * (1 + 11 * n % 25)}]} for n in range(40)]
    lengths = [len(tokenizer.encode(text["text"])) + 1 for text in texts]
    chats = [
        len(examples(normalise(one, config.ChatRecord(name="chat")), tokenizer.chat_template, tokenizer)[0].tokens) - 1
        for one in turns
    ]
    assert max(lengths) > 100 and max(chats) > 100
    plans = [make_plan(np.array(lengths), 100, "split"), make_plan(np.array(chats), 100, "drop")]
    (tmp_path / "bench.json").write_text(json.dumps({"tokens_per_second": 400.0}))
    answer = check_files(
        tokenizer,
        write_lines("a.jsonl", texts + turns),
        seq_len=100,
        batch_size=4,
        bench=tmp_path / "bench.json",
        allowed=frozenset({"mixed-kinds"}),
    )
    rows = sum(plan.num_rows for plan in plans)
    assert answer["packing"] == {
        "rows": rows,
        "efficiency": round(sum(plan.num_tokens for plan in plans) / rows / 100, 4),
        "batch_size": 4,
        "steps_per_epoch": -(-rows // 4),
        "seconds_per_epoch": -(-rows // 4),
        "sources": [{"files": [str(tmp_path / "a.jsonl")], "rows": rows, "times_seen": 1.0}],
    }
    over = [n - 100 for n in lengths + chats if n > 100]
    assert answer["truncation"] == {
        "seq_len": 100,
        "examples_longer": len(over),
        "tokens_beyond": sum(over),
        "examples_with_fitting_turns": 0,
    }
    assert answer["problem_counts"] == {"too-long": sum(n > 100 for n in chats)}  # texts are split


def test_a_bench_that_is_none(tokenizer: HuggingFace, write_lines: Write, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bench\.json has no tokens_per_second; write it with: moe-train bench"):
        check_files(tokenizer, write_lines("a.jsonl", KINDS), bench=tmp_path / "bench.json")


def test_lengths_are_counted_in_bins_up_to_a_power_of_two() -> None:
    assert histogram(Counter({3: 2, 4: 1, 9: 1})) == {
        "mean": 4.8,
        "median": 3,
        "p95": 9,
        "max": 9,
        "histogram": [{"up_to": 4, "examples": 3}, {"up_to": 8, "examples": 0}, {"up_to": 16, "examples": 1}],
    }
    assert histogram(Counter()) is None


def test_an_epoch_is_as_long_as_its_slowest_source() -> None:
    sources = [CheckedSource(("a",), weight=3.0), CheckedSource(("b",), weight=1.0)]
    lengths = {(0, "text"): {11: 3}, (1, "text"): {11: 3}}
    result = epoch(lengths, {}, sources, seq_len=10, batch_size=5, tokens_per_second=10.0)
    seen = [{"files": ["a"], "rows": 3, "times_seen": 3.0}, {"files": ["b"], "rows": 3, "times_seen": 1.0}]
    assert result.pop("sources") == seen
    assert result == {"rows": 6, "efficiency": 1.0, "batch_size": 5, "steps_per_epoch": 3, "seconds_per_epoch": 15.0}


def test_without_weights_every_source_is_seen_once() -> None:
    lengths = {(0, "text"): {11: 1}, (1, "text"): {11: 40}}
    result = epoch(lengths, {}, [CheckedSource(("a",)), CheckedSource(("b",))], 10, batch_size=1, tokens_per_second=None)
    assert result["steps_per_epoch"] == 41 and [source["times_seen"] for source in result["sources"]] == [1, 1]


def test_turns_with_tools_that_fit_are_counted_of_an_example_that_is_too_long() -> None:
    lengths = {(0, "chat"): {31: 3, 11: 1}}
    fitting = {(0, "chat"): Counter({(31, 6): 2})}
    result = epoch(lengths, fitting, [CheckedSource(("a",))], seq_len=10, batch_size=None, tokens_per_second=None)
    assert (result["rows"], result["efficiency"]) == (2, 1.0)
    assert truncation(lengths, fitting, 10) == {
        "seq_len": 10,
        "examples_longer": 3,
        "tokens_beyond": 60,
        "examples_with_fitting_turns": 2,
    }
