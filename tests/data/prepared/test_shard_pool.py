"""Shards in one process or several: the same set, the progress of all of them, errors that name the record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_train.data.prepared import shards
from moe_train.data.prepared.shard_pool import PrepareProgress
from moe_train.data.records import scan
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.prepared.stores import CHAT, MESSAGES, ids, stored


def test_several_processes_make_the_same_set(
    tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan.scan_file, "__defaults__", ((1000, 1000),))
    monkeypatch.setattr(shards.cut, "__defaults__", (1000,))
    path = write_lines("a.jsonl", [{"messages": MESSAGES}] * 100)
    seen: list[PrepareProgress] = []
    alone, together = (
        stored(path, record=CHAT, tokenizer=tokenizer, cache=tmp_path / str(n), num_proc=n, report=seen.append) for n in (1, 2)
    )
    assert alone.manifest == together.manifest and ids(alone) == ids(together)
    count = len(alone.manifest.shards)
    assert seen.count(PrepareProgress(count, count, 100, alone.manifest.tokens)) == 2
    broken = write_lines("b.jsonl", [{"messages": MESSAGES}] * 80 + [{"messages": []}])
    with pytest.raises(ValueError, match=r"b\.jsonl:81: .*message"):
        stored(broken, record=CHAT, tokenizer=tokenizer, cache=tmp_path / "2", num_proc=2)
