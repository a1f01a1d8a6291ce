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
from moe_train.data.prepared import shards
from moe_train.data.prepared.shards import cut, scan
from moe_train.data.records.sources import Records, open_source

TEXT = config.TextRecord(name="text")


def opened(*files: Path) -> Records:
    return open_source(config.FileSource(name="files", files=tuple(map(str, files)), record=TEXT))


def scans(records: Records, memory: Path, step: int) -> list[shards.Scan]:
    return [scan(f, c, memory, (step, step)) for f, c in zip(records.files, records.cuttable, strict=True)]


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
    before, shards._BLOCK = shards._BLOCK, block
    try:
        found = scans(records, root / "scans", step)
    finally:
        shards._BLOCK = before
    made = cut(records, found, "rules", step)
    read = [((span.place, number), record) for shard in made for span in shard.spans for number, record in records.read(span)]
    assert read == [(tuple(origin), record) for origin, record in records]
    assert [f.sha256 for f in found] == [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def test_small_files_share_a_shard_and_others_are_whole(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(50))
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(os.urandom(300), mtime=0))
    (tmp_path / "e.jsonl").write_text(lines)
    records = opened(tmp_path)
    made = cut(records, scans(records, tmp_path / "scans", 200), "rules", 200)
    assert [[span.place for span in shard.spans] for shard in made][:2] == [[0, 1, 2], [3]]
    assert all(span.place == 4 for shard in made[2:] for span in shard.spans) and len(made) > 3
    other = cut(records, scans(records, tmp_path / "scans", 200), "other rules", 200)
    assert not {shard.key for shard in made} & {shard.key for shard in other}


def test_a_file_is_read_again_only_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, memory = tmp_path / "a.jsonl", tmp_path / "scans"
    file.write_text('{"text": "a"}\n')
    first = scan(file, True, memory)
    assert not memory.exists(), "it was written just now: it could change within the same tick of the clock"
    os.utime(file, ns=(10**18, 10**18))
    assert scan(file, True, memory) == first and len(list(memory.iterdir())) == 1
    file.chmod(0)
    monkeypatch.setattr(hashlib, "sha256", forgetful := _Counting())
    assert scan(file, True, memory) == first and forgetful.files == 0
    file.chmod(0o644)
    file.write_text('{"text": "b"}\n')
    assert scan(file, True, memory) != first and forgetful.files == 1


class _Counting:
    """hashlib.sha256, counting how often it starts empty, as for the content of a file."""

    files = 0
    original = staticmethod(hashlib.sha256)

    def __call__(self, data: bytes | None = None):
        self.files += data is None
        return self.original() if data is None else self.original(data)
