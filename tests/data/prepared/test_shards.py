"""Cutting sources into shards: every line in one of them, at its own number; keys that follow the content."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train import config
from moe_train.data.prepared.shards import cut
from moe_train.data.records import scan
from moe_train.data.records.open_source import open_source
from moe_train.data.records.source import OpenSource

TEXT = config.TextRecord(name="text")


def opened(*files: Path) -> OpenSource:
    return open_source(config.FileSource(name="files", files=tuple(map(str, files)), record=TEXT))


@settings(deadline=None, max_examples=60)
@given(
    files=st.lists(st.lists(st.integers(0, 60), max_size=30), min_size=1, max_size=4),
    step=st.integers(1, 400),
    end=st.sampled_from(["\n", ""]),
    block=st.sampled_from([7, 64, 1 << 20]),
)
def test_every_record_is_in_one_shard_at_its_own_line(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[int]], step: int, end: str, block: int
) -> None:
    root = tmp_path_factory.mktemp("cut")
    paths = []
    for i, lengths in enumerate(files):  # a length of 0 is an empty line
        lines = [json.dumps({"text": f"{i}.{n} " + "x" * length}) if length else "" for n, length in enumerate(lengths)]
        paths.append(root / f"{i}.jsonl")
        paths[-1].write_text("\n".join(lines) + end)
    records = opened(*paths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "_BLOCK", block)
        patch.setattr(scan.scan_file, "__defaults__", ((step, step),))
        found = records.scan(root / "scans")
    made = cut(records, found, "rules", step)
    read = [((span.place, number), record) for shard in made for span in shard.spans for number, record in records.read(span)]
    assert read == [(tuple(origin), record) for origin, record in records]
    assert [f.sha256 for f in found] == [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def test_small_files_share_a_shard_and_others_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan.scan_file, "__defaults__", ((200, 200),))
    lines = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(50))
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(os.urandom(300), mtime=0))
    (tmp_path / "e.jsonl").write_text(lines)
    records = opened(tmp_path)
    made = cut(records, records.scan(tmp_path / "scans"), "rules", 200)
    assert [[span.place for span in shard.spans] for shard in made][:2] == [[0, 1, 2], [3]]
    assert all(span.place == 4 for shard in made[2:] for span in shard.spans) and len(made) > 3
    other = cut(records, records.scan(tmp_path / "scans"), "other rules", 200)
    assert not {shard.key for shard in made} & {shard.key for shard in other}
