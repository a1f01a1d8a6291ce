"""Records that a caller holds: packed, shuffled, trained on and resumed as the same records in a file are."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from moe_train import config
from moe_train.data.batches.batch import BatchRows
from moe_train.data.batches.loader import Loader
from moe_train.data.prepared import shard_pool
from moe_train.data.records import python_source
from moe_train.data.records.open_source import open_source
from moe_train.data.tokenizers.huggingface import HuggingFace

WORDS = "the quick brown fox jumps over lazy dog".split()
RECORDS = [{"text": " ".join(np.random.default_rng(i).choice(WORDS, 1 + i % 23))} for i in range(60)]
TEXT = config.TextRecord(name="text")
USER = {"role": "user", "content": "How high is the tide?"}


class InMemory:
    """The smallest source; records can be a list or a `datasets.Dataset`."""

    def __init__(self, records: Any, identity: str = "1") -> None:
        self.records = records
        self.identity = identity

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.records[index]

    def where(self, index: int) -> str:
        return f"orders.db, row {1000 + index}"


def section(records: Any, record: config.Record = TEXT, **more: Any) -> config.PythonSource:
    return config.PythonSource(name="python", records=records, record=record, **more)


def loader(source: config.Source, tokenizer: HuggingFace, cache: Path, num_proc: int = 1) -> Loader:
    data = config.Data(train=(source,), cache_dir=str(cache), num_proc=num_proc)
    return Loader(data, "train", tokenizer, BatchRows(4, 32), seed=0)


def batches(loader: Loader, start: int = 0) -> list[list[Any]]:
    return [[array.tolist() for array in batch] for batch in itertools.islice(loader.iterate(start), 6)]


@pytest.mark.parametrize("num_proc", [1, 2])
def test_batches_are_those_of_the_same_records_in_a_file(
    tokenizer: HuggingFace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_proc: int
) -> None:
    monkeypatch.setattr(python_source, "_PER_PART", 25)
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    of_file = loader(config.FileSource(name="files", files=(str(file),), record=TEXT), tokenizer, tmp_path / "1")
    own = loader(section(InMemory(RECORDS)), tokenizer, tmp_path / "2", num_proc)
    assert batches(own) == batches(of_file)
    assert batches(own, 3) == batches(loader(section(InMemory(RECORDS)), tokenizer, tmp_path / "2"), 3), "as a resume has it"
    assert own.num_records == 60 and json.loads(own.manifest)["sets"][0]["files"][0]["path"] == "records"
    assert len(own._sources[0].store.manifest.shards) == 3
    assert [[s[2:] for s in own.trace(0, row)] for row in range(4)] == [[s[2:] for s in of_file.trace(0, row)] for row in range(4)]


@pytest.mark.parametrize("nested", [{"buoy": None}, {"at": [{"buoy": None}]}])
def test_a_null_in_an_object_is_refused_as_a_table_may_have_filled_it_in(nested: dict[str, Any]) -> None:
    call = {"id": "abcde1234", "type": "function", "function": {"name": "f", "arguments": nested}}
    tool = {"type": "function", "function": {"name": "f", "description": None, "parameters": nested}}
    calling = {"role": "assistant", "content": None, "tool_calls": [call], "tool_call_id": None}
    chat = config.ChatRecord(name="chat")
    for record in ({"messages": [calling]}, {"messages": [USER], "tools": [tool]}):
        with pytest.raises(ValueError, match=r"orders\.db, row 1000: (messages|tools)\.0.*\.buoy is null, which a table may"):
            list(open_source(section(InMemory([record]), chat)))
    call["function"]["arguments"] = json.dumps(nested)
    assert len(list(open_source(section(InMemory([{"messages": [USER, calling], "label": None}]), chat)))) == 1


def test_a_data_set_of_the_datasets_library_is_such_records(tokenizer: HuggingFace, tmp_path: Path) -> None:
    listed = loader(section(InMemory(RECORDS)), tokenizer, tmp_path / "1")
    arrow = loader(section(InMemory(datasets.Dataset.from_list(RECORDS))), tokenizer, tmp_path / "2")
    assert batches(arrow) == batches(listed) and arrow.identity == listed.identity


@pytest.mark.parametrize("faulty", [{"text": 3}, {"other": "x"}, "text", None])
def test_a_faulty_record_is_named_by_its_where(tokenizer: HuggingFace, tmp_path: Path, faulty: Any) -> None:
    with pytest.raises(ValueError, match=r"^orders\.db, row 1002: [^\n]*$"):
        loader(section(InMemory([*RECORDS[:2], faulty])), tokenizer, tmp_path)


def test_an_error_of_the_source_itself_is_named_too(tokenizer: HuggingFace, tmp_path: Path) -> None:
    class Failing(InMemory):
        def __getitem__(self, index: int) -> Mapping[str, Any]:
            raise ValueError("the row\nis locked")

    with pytest.raises(ValueError, match=r"^orders\.db, row 1000: the row is locked; correct the record"):
        loader(section(Failing(RECORDS)), tokenizer, tmp_path)


def test_a_record_that_is_too_long_is_named_by_its_where(tokenizer: HuggingFace, tmp_path: Path) -> None:
    record = config.TextRecord(name="text", too_long="error")
    with pytest.raises(ValueError, match=r"^orders\.db, row 1001: the record has \d+ tokens, train\.seq_len is 32"):
        loader(section(InMemory([RECORDS[0], {"text": "fox " * 90}]), record), tokenizer, tmp_path)


def test_the_identity_decides_what_is_made_again(tokenizer: HuggingFace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = loader(section(InMemory(RECORDS)), tokenizer, tmp_path)
    other = loader(section(InMemory(RECORDS[:50], "2"), title="orders"), tokenizer, tmp_path)
    assert first.identity != other.identity and first.manifest_hash != other.manifest_hash
    monkeypatch.setattr(shard_pool, "write_shard", lambda *_: pytest.fail("made again"))
    assert loader(section(InMemory(RECORDS)), tokenizer, tmp_path).identity == first.identity


def test_records_that_change_while_they_are_read_are_refused(tokenizer: HuggingFace, tmp_path: Path) -> None:
    class Changing(InMemory):
        def __getitem__(self, index: int) -> Mapping[str, Any]:
            self.identity = "2"
            return self.records[index]

    with pytest.raises(ValueError, match="records were changed while they were read"):
        loader(section(Changing(RECORDS)), tokenizer, tmp_path)


def test_records_that_cannot_be_pickled_need_one_process(
    tokenizer: HuggingFace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(python_source, "_PER_PART", 25)
    own = InMemory(RECORDS)
    own.connection = threading.Lock()  # type: ignore[attr-defined]
    with pytest.raises(
        ValueError, match=r"^records: the records cannot be passed to other processes \(.*; set data\.num_proc to 1"
    ):
        loader(section(own), tokenizer, tmp_path, num_proc=2)
    assert loader(section(own), tokenizer, tmp_path).num_records == 60


def test_what_is_no_source_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"the records of records are a list without identity, where; see moe_train\.data"):
        open_source(section(RECORDS))
    with pytest.raises(ValueError, match=r"the records of orders belong to the program that trained on them; pass them again"):
        open_source(section(None, title="orders"))


def test_a_config_names_the_source_without_its_records() -> None:
    dumped = section(InMemory(RECORDS), title="orders").model_dump(mode="json")
    assert "records" not in dumped and config.PythonSource.model_validate(dumped).title == "orders"
