"""Rows of a head as a page and as text: where scores are read, and what is known of each text."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moe_train import config
from moe_train.commands.show import print_rows, rows_of_run
from moe_train.commands.show_page import page
from moe_train.data.tokenizers.huggingface import HuggingFace

PAIR = {"prompt": "Say 1", "chosen": "One.", "rejected": "Two"}
TEXTS = [{"text": f"the quick <{animal}>", "labels": {"animal": animal}} for animal in ("dog", "fox")]


@pytest.mark.parametrize(
    ("objective", "record", "fields", "notes"),
    [
        ({"name": "reward"}, "preference", [PAIR], ["pair 1, chosen", "pair 1, rejected"]),
        ({"name": "classification", "labels": {"animal": ["fox", "dog"]}}, "classification", TEXTS, ["animal: dog", "animal: fox"]),
    ],
)
def test_the_token_with_the_score_stands_out(
    objective: Any,
    record: str,
    fields: Any,
    notes: list[str],
    tokenizer: HuggingFace,
    tmp_path: Path,
    write_lines: Callable[..., Path],
) -> None:
    source = {"name": "files", "files": [str(write_lines("a.jsonl", fields))], "record": {"name": record}}
    tree = {
        "name": "r",
        "run_dir": str(tmp_path / "run"),
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
        "model": {
            "family": "mistral",
            "vocab_size": 360,
            "model_dim": 8,
            "num_layers": 1,
            "ffn": {"name": "dense", "ffn_dim": 8},
            "attention": {"num_heads": 1, "num_kv_heads": 1, "head_dim": 8},
        },
        "objective": objective,
        "data": {"train": [source], "cache_dir": str(tmp_path / "cache")},
        "train": {"batch_size": 1, "seq_len": 128, "steps": 1},
    }
    run = config.Config.model_validate_json(json.dumps(tree))
    rows = rows_of_run(run, 1, tokenizer)
    written = page(rows, tokenizer, "rows", False)
    titles = re.findall(r"<h2>([^<]*)", written)
    assert sorted(re.sub(r".*a\.jsonl:\d, (.*), \d+ tokens", r"\1", title) for title in titles) == notes
    assert "scores are read at green tokens" in html.unescape(written) and f"{len(notes)} of them with scores" in written
    marked = re.findall(r'<span class="l[ c]*" title="position (\d+)', written)
    last = [max(map(int, re.findall(r"position (\d+)", part))) for part in written.split("<h2>")[1:]]
    assert [int(position) for position in marked] == last
    console = Console(file=io.StringIO(), width=200)
    print_rows(rows, tokenizer, console, True)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(note in printed for note in notes) and printed.count(" yes ") == len(notes)
