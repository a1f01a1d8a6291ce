"""Damaged and hostile files: the check of data never shows a traceback, never hangs, and never passes over anything.

A few hundred files, always the same, in every run of the tests; `--slow` draws tens of thousands, others each time. The counts are
printed (`-s`).
"""

from __future__ import annotations

import bz2
import collections
import gzip
import io
import json
import lzma
import signal
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_train import config
from moe_train.commands import show
from moe_train.data.batches.batch import Batch
from moe_train.data.check.check import check_data
from moe_train.data.check.settings import RULE_NAMES, CheckSettings
from moe_train.data.check.sources import CheckedSource
from moe_train.data.prepared.tokenize_ahead import prepare
from moe_train.data.prepared.tokenize_shard import Recipe
from moe_train.data.records.open_source import open_source
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.records.tables import json_array

SECONDS = 20  # of the processor, for one file; a few KB take milliseconds
USER = {"role": "user", "content": "What is 2 + 3?"}
RECORDS = [
    {"text": "Grüße, 東京"},
    {"messages": [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "5"}]},
    {"question": "2 + 3?", "answer": "5"},
]
tried: collections.Counter[str] = collections.Counter()
uses: collections.Counter[str] = collections.Counter()


@pytest.fixture(scope="module", autouse=True)
def say_counts() -> Iterator[None]:
    yield
    print(f"\nfuzzed files: {tried.total()}", *(f"{name} {count}" for name, count in (tried + uses).most_common()), sep="\n  ")


@contextmanager
def no_hang(seconds: int = SECONDS) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # counts the processor's time, however busy the machine is
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def checked(tokenizer: HuggingFace, name: str, content: bytes, kind: str, seconds: int = SECONDS) -> dict[str, Any] | None:
    """The answer, which says something of every file; None where the file stops the check with one line."""
    tried[kind] += 1
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / name
        path.write_bytes(content)
        asked = CheckSettings(template=tokenizer.chat_template, seq_len=64, batch_size=2, fix=Path(scratch) / "out")
        try:
            with no_hang(seconds):
                answer = check_data([CheckedSource((str(path),))], tokenizer, asked)
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            return None
        json.dumps(answer)
        used(tokenizer, path, seconds)
        assert path.read_bytes() == content
        fixed = answer["fixed"]
        assert fixed["kept"] + fixed["dropped"] == answer["records"]
        assert answer["problem_counts"].keys() <= RULE_NAMES
        # Nothing is passed over: each record is good, or named as bad; and a file without records is named too.
        assert answer["records"] or answer["problem_counts"]
        good = sum(answer["shapes"].values())
        assert answer["records_with_problems"] >= answer["records"] - good
        for problem in answer["problems"]:
            assert problem["where"].startswith(str(path)) and problem["message"] and problem["remedy"]
            assert "\n" not in problem["message"]
        if fixed["kept"]:  # what was kept is good, or is said to be left as it is, since training would take it
            out = Path(scratch) / "out"
            [copy] = [file for file in out.iterdir() if file.name != "changes.log"]
            changes = [json.loads(line) for line in (out / "changes.log").read_text(encoding="utf-8").splitlines()]
            left = {change["rule"] for change in changes if change["action"] == "left"}
            settings_again = CheckSettings(template=tokenizer.chat_template, seq_len=64)
            again = check_data([CheckedSource((str(copy),))], tokenizer, settings_again)
            # The copy keeps the kinds of the damaged file, texts that training accepts as they are, and records whose only
            # fault is that this template has no tools.
            assert {problem["rule"] for problem in again["problems"]} <= {"mixed-kinds", "control-token", "tools"} | left
            assert again["records"] == fixed["kept"]
        return answer


def used(tokenizer: HuggingFace, path: Path, seconds: int = SECONDS) -> None:
    """`data show` and `data prepare` take the file, or refuse it with one line that names it."""

    def shown() -> None:
        record = show.record_of([str(path)], "auto")
        source = config.FileSource(name="files", files=(str(path),), record=record)
        rows = show.rows_of_records(source, 100, tokenizer, tokenizer.chat_template, 64 if record.name == "text" else None)
        assert json.dumps(show.segments_to_json(show.Rows(Batch(*(array[:2] for array in rows.batch)), rows.places[:2]), tokenizer))

    def prepared() -> None:
        source = config.FileSource(name="files", files=(str(path),), record=show.record_of([str(path)], "auto"))
        with tempfile.TemporaryDirectory() as cache:
            prepare(Recipe(source, open_source(source), tokenizer, tokenizer.chat_template), cache)

    for use in (shown, prepared):
        try:
            with no_hang(seconds):
                use()
            uses[f"used by {use.__name__}"] += 1
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            uses[f"refused by {use.__name__}"] += 1


def packed(table: pa.Table, kind: str) -> bytes:
    sink = io.BytesIO()
    if kind == "parquet":
        pyarrow.parquet.write_table(table, sink)
    else:
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


def archived(**members: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name.replace("_", "."), (2026, 11, 29, 0, 0, 0)), content)
    return sink.getvalue()


LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS * 3).encode()
TABLE = pa.table({"text": ["one", "zwei", None, ""], "id": [1, 2, 3, 4]})
CHATS = pa.Table.from_pylist([RECORDS[1], {"messages": [USER]}])
OF_JSON = pa.table({"messages": json_array([json.dumps(RECORDS[1]["messages"]), None]), "day": pa.array([0, None], pa.date32())})
WHOLE = {
    "a.jsonl": LINES,
    "a.json": json.dumps(RECORDS, indent=1).encode(),
    "b.json": json.dumps({"version": 1, "data": RECORDS}).encode(),
    "c.json": "\n".join(json.dumps(record, indent=1) for record in RECORDS).encode(),
    "a.tsv": b'question\tanswer\n"2,\t3?"\t5\na\t"b\nc"\n',
    "a.csv": b'question,answer\n"2, 3?",5\na,"b\nc"\n',
    "a.txt": "Grüße\n".encode(),
    "a.jsonl.gz": gzip.compress(LINES, mtime=0),
    "a.jsonl.bz2": bz2.compress(LINES),
    "a.jsonl.xz": lzma.compress(LINES),
    "a.jsonl.zst": pa.Codec("zstd").compress(LINES, asbytes=True),
    "a.parquet": packed(TABLE, "parquet"),
    "b.parquet": packed(CHATS, "parquet"),
    "c.parquet": packed(OF_JSON, "parquet"),
    "a.arrow": packed(TABLE, "arrow"),
    "c.arrow": packed(OF_JSON, "arrow"),
    "a.zip": archived(a_jsonl=LINES),
    "b.zip": archived(a_parquet=packed(CHATS, "parquet")),
    "b.arrow": packed(CHATS, "arrow"),
}
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["user", "assistant", "</s>"])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=4)),
    max_leaves=12,
)
KEYS = st.sampled_from(
    "text content messages interactions conversations tools available_tools prompt completion question answer system role from "
    "value weight tool_calls tool_call_id function name arguments id type parameters".split()
)
NEARLY = st.recursive(
    st.one_of(VALUES, st.sampled_from(["user", "assistant", "tool", "system", "{}"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=5)),
    max_leaves=20,
)
MESSAGE = st.dictionaries(KEYS, NEARLY, max_size=5).flatmap(
    lambda drawn: st.sampled_from([drawn, drawn | USER, drawn | {"role": "assistant", "content": "5"}, drawn | {"from": "gpt"}])
)
RECORD = st.one_of(
    st.dictionaries(KEYS, NEARLY, max_size=5),
    st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=4)}, optional={"tools": NEARLY}),
    st.fixed_dictionaries({"conversations": st.lists(MESSAGE, max_size=4)}),
)


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, bytes, str]:
    """A good file with bytes changed, cut, put in or doubled."""
    name = draw(st.sampled_from(sorted(WHOLE)))
    content = bytearray(WHOLE[name])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        match draw(st.sampled_from(["cut", "change", "insert", "delete", "double"])):
            case "cut":
                del content[at:]
            case "change":
                content[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "insert":
                content[at:at] = draw(
                    st.sampled_from([b"\0", b"\xff", b"\n", b'"', b"{", b"]", b"\xed\xa0\x80", b"\xff\xfe", b"NaN"])
                )
            case "delete":
                del content[at : at + draw(st.integers(1, 20))]
            case "double":
                content[at:at] = content[at : at + 50]
    return name, bytes(content), "damaged"


def any_bytes() -> st.SearchStrategy[tuple[str, bytes, str]]:
    alphabet = st.sampled_from(
        [b"{", b"}", b"[", b"]", b'"', b":", b",", b"\n", b"\\", b"\0", b"1", b"text", b"\xff", b" ", b"\\ud800"]
    )
    content = st.one_of(st.binary(max_size=300), st.lists(alphabet, max_size=60).map(b"".join))
    return st.tuples(st.sampled_from(sorted(WHOLE)), content, st.just("any bytes"))


def records() -> st.SearchStrategy[tuple[str, bytes, str]]:
    def written(drawn: list[Any]) -> tuple[str, bytes, str]:
        return "a.jsonl", "\n".join(map(json.dumps, drawn)).encode(), "odd records"

    return st.lists(RECORD, min_size=1, max_size=4).map(written)


CALL = {"id": "call00000", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
GOOD = [
    *RECORDS,
    {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "call00000", "content": "5"},
                  {"role": "assistant", "content": "5", "weight": 1}], "tools": [TOOL]},
    {"interactions": [USER, {"role": "assistant", "content": [{"type": "text", "text": "5"}]}], "available_tools": [TOOL]},
    {"conversations": [{"from": "human", "value": "2 + 3?"},
                       {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 3}}'},
                       {"from": "observation", "value": "5"}, {"from": "gpt", "value": "5"}], "system": "Be brief.", "tools": "[]"},
    {"prompt": [USER], "completion": [{"role": "assistant", "content": "5"}]},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a value has parts, of any depth."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in below for place in places(part, (*path, key)))] if path or below else []


@st.composite
def spoilt(draw: st.DrawFn) -> tuple[str, bytes, str]:
    """Good records with one to three of their parts, of any depth, made something else, left out, doubled or swapped."""
    records = []
    for _ in range(draw(st.integers(1, 3))):
        record: Any = json.loads(json.dumps(draw(st.sampled_from(GOOD))))
        for _ in range(draw(st.integers(1, 3))):
            *above, key = draw(st.sampled_from(places(record)[1:] or [("text",)]))
            holder = record
            for step in above:
                holder = holder[step]
            match draw(st.sampled_from(["change", "leave out", "double", "rename"])):
                case "leave out" if key in holder or isinstance(holder, list):
                    del holder[key]
                case "double" if isinstance(holder, list):
                    holder.append(holder[key])
                case "rename" if isinstance(holder, dict) and key in holder:
                    holder[draw(KEYS)] = holder.pop(key)
                case _:
                    holder[key] = draw(NEARLY)
        records.append(record)
    return "a.jsonl", "\n".join(map(json.dumps, records)).encode(), "spoilt records"


def fuzz(tokenizer: HuggingFace, files: st.SearchStrategy[tuple[str, bytes, str]], count: int, *, drawn_anew: bool) -> None:
    @settings(
        max_examples=count,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=not drawn_anew,
    )
    @given(files)
    def one(drawn: tuple[str, bytes, str]) -> None:
        checked(tokenizer, *drawn)

    one()


KINDS: list[Callable[[], st.SearchStrategy[tuple[str, bytes, str]]]] = [damaged, any_bytes, records, spoilt]


@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_files(tokenizer: HuggingFace, kind: Callable[[], st.SearchStrategy[tuple[str, bytes, str]]]) -> None:
    fuzz(tokenizer, kind(), 100, drawn_anew=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_files(tokenizer: HuggingFace, kind: Callable[[], st.SearchStrategy[tuple[str, bytes, str]]]) -> None:
    fuzz(tokenizer, kind(), 5000, drawn_anew=True)


@pytest.mark.parametrize("name", [name for name in WHOLE if name != "a.txt" and not name.endswith(".zip")])
def test_a_file_cut_anywhere_is_named(tokenizer: HuggingFace, name: str) -> None:
    whole = checked(tokenizer, name, WHOLE[name], "whole")
    assert whole is not None
    content = WHOLE[name]
    for at in sorted({len(content) * k // 9 for k in range(9)} | {len(content) - 1}):
        answer = checked(tokenizer, name, content[:at], "cut")
        assert answer is not None
        ended = name in ("a.jsonl", "c.json") and content[at : at + 1] in (b"\n", b"")  # then what is left is whole
        assert (
            ended
            or name in ("a.csv", "a.tsv")
            or answer["problem_counts"] != whole["problem_counts"]
            or answer["records"] < whole["records"]
        )


@pytest.mark.parametrize("name", ["a.zip", "b.zip"])
def test_an_archive_cut_anywhere_is_one_problem(tokenizer: HuggingFace, name: str) -> None:
    content = WHOLE[name]
    assert checked(tokenizer, name, content, "whole") is not None
    for at in sorted({len(content) * k // 9 for k in range(9)} | {len(content) - 1}):
        answer = checked(tokenizer, name, content[:at], "cut")
        assert answer is not None and answer["problem_counts"] == {"unreadable": 1} and answer["records"] == 1


@pytest.mark.parametrize(
    ("name", "content", "rules"),
    [
        ("latin.jsonl", '{"text": "Grüße"}\n'.encode("latin-1") + LINES, {"not-utf-8": 1, "mixed-kinds": 2}),
        ("utf16.jsonl", LINES.decode().encode("utf-16"), {"not-utf-8": 10}),
        ("nul.jsonl", LINES + b"\0" * 5000 + b"\n" + LINES, {"not-json": 1, "mixed-kinds": 2}),
        ("nul.txt", b"a\0b", {"unicode": 1}),
        ("deep.jsonl", b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n" + LINES, {"not-json": 1, "mixed-kinds": 2}),
        ("deeper.jsonl", (b'{"a":' * 90 + b"1" + b"}" * 90 + b"\n") * 3, {"columns": 3}),
        ("deep.json", b"[" * 100_000 + b"]" * 100_000, {"not-json": 1}),
        ("open.jsonl", b'{"text": "' + b"a" * 100_000, {"not-json": 1}),
        ("quotes.csv", b'text\n"' + b"a" * 100_000, {"unreadable": 1}),
        ("numbers.jsonl", b'{"text": "a", "n": ' + b"9" * 100_000 + b"}", {"not-json": 1}),
        ("keys.jsonl", b'{"text": "a", "text": "b"}', {"not-json": 1}),
        ("infinite.jsonl", b'{"text": "a", "n": -Infinity}', {"not-json": 1}),
        ("empty.parquet", b"", {"unreadable": 1}),
        ("nothing.jsonl", b"", {"empty-file": 1}),
        ("bom.jsonl", b"\xef\xbb\xbf", {"empty-file": 1}),
        ("no.json", b"[", {"not-json": 1}),
        ("cr.jsonl", LINES.replace(b"\n", b"\r"), {"not-json": 1}),
        ("twice.json", json.dumps(RECORDS).encode() * 2, {"not-json": 1, "mixed-kinds": 2}),
        ("ids.jsonl", b'{"messages": [{"text": [], "tool_call_id": []}, {"from": "tool"}]}', {"columns": 1}),
        ("calls.jsonl", json.dumps({"messages": [USER, {"role": "assistant", "tool_calls": [[[]]]}]}).encode(), {"arguments": 1}),
    ],
)
def test_hostile_files(tokenizer: HuggingFace, name: str, content: bytes, rules: dict[str, int]) -> None:
    answer = checked(tokenizer, name, content, "hostile")
    assert answer is not None and answer["problem_counts"] == rules


_SLOW_UNITS = ("ab ", "東", "\\u0000", "<s>", "0")
UNITS = ["a", '\\"', *(pytest.param(unit, marks=pytest.mark.slow) for unit in _SLOW_UNITS)]


@pytest.mark.parametrize("unit", UNITS)
def test_lines_of_ten_megabytes(tokenizer: HuggingFace, unit: str) -> None:
    """Ten for the plainest; a tokenizer takes a while for others, which are a tenth as long."""
    size = 10_000_000 if unit == "ab " else 1_000_000
    content = b'{"text": "' + (unit * (size // len(unit.encode()))).encode() + b'"}\n{"text": "after"}\n'
    answer = checked(tokenizer, "long.jsonl", content, "long lines", seconds=300)  # a busy core takes 40
    assert answer is not None and answer["records"] == 2
    assert answer["problem_counts"] == {"\\u0000": {"unicode": 1}, "<s>": {"control-token": 1}}.get(unit, {})
