"""Values of Arrow columns as JSON values: filled-in nulls are left out, JSON columns are parsed, the rest has one form or none."""

from __future__ import annotations

import datetime
import decimal
import json
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from moe_train import config
from moe_train.data.records.column_values import rows
from moe_train.data.records.conversation import read
from moe_train.data.records.media import references_of
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.problem import Problem, check_usable
from tests.data.records.sources import opened, texts
from tests.data.records.tables import json_array, write_table

CALLS = [{"name": "tide", "arguments": {"port": "Brest"}}, {"name": "wind", "arguments": {"buoy": 7}}]


def column(array: pa.Array) -> list[Any]:
    return [record["c"] for record in rows(pa.table({"c": array}))]


def test_nulls_that_a_struct_filled_in_are_left_out_at_every_depth() -> None:
    values = [[call] for call in CALLS] + [[{"name": "none", "arguments": {}}], [], None]
    assert column(pa.array(values)) == values


def test_nulls_that_only_the_writer_can_put_there_are_kept() -> None:
    kind = pa.struct([("enum", pa.list_(pa.string())), ("extra", pa.map_(pa.string(), pa.int64()))])
    value = {"enum": ["a", None], "extra": {"x": None, "y": 1}}
    assert column(pa.array([value | {"extra": list(value["extra"].items())}], kind)) == [value]  # type: ignore[attr-defined]
    assert column(json_array(['{"buoy": null, "deep": [{"x": null}]}', "null", None])) == [
        {"buoy": None, "deep": [{"x": None}]},
        None,
        None,
    ]


def test_json_inside_of_lists_and_structs_is_parsed() -> None:
    inner = json_array(['{"port": "Brest"}', "[1.0, null]", '"text"'])
    struct = pa.StructArray.from_arrays([inner], ["arguments"])
    nested = pa.ListArray.from_arrays(pa.array([0, 2, 3]), struct)
    assert column(nested) == [[{"arguments": {"port": "Brest"}}, {"arguments": [1.0, None]}], [{"arguments": "text"}]]


@pytest.mark.parametrize(
    ("array", "value"),
    [
        (pa.array([datetime.datetime(2026, 11, 29, 12, 30, tzinfo=datetime.UTC)]), "2026-11-29T12:30:00+00:00"),
        (pa.array([1], pa.timestamp("ns")), "1970-01-01T00:00:00.000000001"),
        (pa.array([datetime.date(2026, 11, 29)]), "2026-11-29"),
        (pa.array([datetime.time(1, 2)]), "01:02:00"),
        (pa.array([decimal.Decimal("1.00")]), 1),
        (pa.array([decimal.Decimal("0.25")]), 0.25),
        (pa.array([1.0], pa.float16()), 1.0),
        (pa.array(["a", "a"]).dictionary_encode()[:1], "a"),
        (pa.array([uuid.UUID(int=7).bytes], pa.uuid()), str(uuid.UUID(int=7))),
        (pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1], pa.int8())), True),
        (pa.array([[1.0, 2.0]], pa.list_(pa.float32(), 2)), [1.0, 2.0]),
        (pa.array(["x"], pa.string_view()), "x"),
        (pa.array([None]), None),
    ],
    ids=str,
)
def test_values_with_one_form_in_json(array: pa.Array, value: Any) -> None:
    [found] = column(array)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("array", "fault"),
    [
        (pa.array([b"\x00"]), "holds b'.x00', for which JSON has no value"),
        (pa.array([{"weight": float("nan")}]), "holds nan, for which JSON has no value"),
        (pa.array([float("inf")]), "holds inf"),
        (pa.array([datetime.timedelta(1)]), "holds datetime.timedelta"),
        (pa.array([decimal.Decimal("0.1234567890123456789")]), "more digits than a number"),
        (pa.array([2**62], pa.timestamp("s")), "cannot be represented"),
        (pa.array([[(1, 2)]], pa.map_(pa.int64(), pa.int64())), "a map with the key 1"),
        (pa.array([[("a", 2), ("a", 3)]], pa.map_(pa.string(), pa.int64())), "a map with the key 'a'"),
        (json_array(["{"]), "which is not JSON: "),
        (json_array(['{"a": 1, "a": 2}']), "'a' stands twice"),
    ],
    ids=str,
)
def test_a_value_without_a_form_in_json_counts_only_where_it_is_read(array: pa.Array, fault: str) -> None:
    table = pa.table({"c": pa.concat_arrays([array, pa.nulls(1, array.type)]), "text": ["a", "b"]})
    first, second = rows(table)
    assert second == {"c": None, "text": "b"} and first["text"] == "a"
    assert isinstance(first["c"], Problem)
    check_usable(first, ["text"])
    with pytest.raises(Problem, match=f"^column 'c' .*{fault}"):
        check_usable(first, ["text", "c"])


@pytest.mark.usefixtures("no_network")
def test_a_picture_is_refused_as_a_picture_unless_it_is_ignored_by_name(tmp_path: Path) -> None:
    path = write_table(pa.table({"text": ["a"], "images": [[b"\x89PNG"]]}), tmp_path / "a.parquet")
    for ignore in ((), ("images",)):
        section = config.TextRecord(name="text", ignore=ignore)
        [(_, fields)] = opened(path, record=section)
        if ignore:
            assert read(fields, section).record == "a"
        else:
            with pytest.raises(Problem, match="has the key 'images': it holds pictures, sound or video"):
                read(fields, section)


@pytest.mark.usefixtures("no_network")
def test_pictures_that_datasets_has_stored(tmp_path: Path) -> None:
    pictures = pa.array(
        [[{"bytes": b"\x89PNG", "path": "a.png"}, {"bytes": None, "path": "b.png"}]],
        pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    )
    messages = [{"role": "user", "content": "<image><image>What?"}, {"role": "assistant", "content": "This."}]
    path = write_table(pa.table({"messages": [json.dumps(messages)], "images": pictures}), tmp_path / "a.parquet")
    section = config.ChatRecord(name="chat")
    [(_, fields)] = opened(path, record=section)
    record = read(fields, section).record
    assert isinstance(record, Conversation) and references_of(record.messages) == ["data:image;base64,iVBORw==", "b.png"]


@pytest.mark.usefixtures("no_network")
def test_bytes_of_pictures_in_columns_and_parts(tmp_path: Path) -> None:
    question = [{"type": "text", "text": "What?", "image": None}, {"type": "image", "text": None, "image": b"\x89PNG"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": [{"type": "text", "text": "This."}]}]
    text = json.dumps([{"role": "user", "content": "<image>What?"}, messages[1]])
    tables = (
        pa.table({"messages": [text], "image": [b"\x89PNG"]}),
        pa.table({"messages": [text], "images": [[b"\x89PNG"]]}),
        pa.table({"messages": [messages]}),
    )
    section = config.ChatRecord(name="chat")
    for number, table in enumerate(tables):
        [(_, fields)] = opened(write_table(table, tmp_path / f"{number}.parquet"), record=section)
        record = read(fields, section).record
        assert isinstance(record, Conversation) and references_of(record.messages) == ["data:image;base64,iVBORw=="]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_training_names_the_row_and_reads_around_columns_that_are_not_asked_for(tmp_path: Path, kind: str) -> None:
    path = write_table(pa.table({"text": ["a", "b"], "c": [1.0, float("nan")]}), tmp_path / f"a.{kind}")
    assert texts(opened(path)) == ["a", "b"]
    with pytest.raises(ValueError, match=rf"a\.{kind}: row 2: column 'c' holds nan"):
        list(opened(path, record=config.TextRecord(name="text", column="c")))
