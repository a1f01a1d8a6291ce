"""The same records in every container have the same normal form, and the check says the same of them.

Hypothesis draws records of every kind: texts, completions, conversations, calls with nested objects as arguments, tools with nested
schemas, weights as integers and floats, preference pairs, labelled answers, settings, history. pyarrow, datasets and pandas write
them. `--slow` draws many more; the counts are printed (`-s`).
"""

from __future__ import annotations

import collections
import json
import operator
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from moe_train import config
from moe_train.data.check.check import check_data
from moe_train.data.check.settings import CheckSettings
from moe_train.data.check.sources import CheckedSource
from moe_train.data.records.conversation import normalise
from moe_train.data.records.open_source import open_source
from moe_train.data.tokenizers.mistral import Mistral
from tests.data.conversations import NAMES, conversations, texts
from tests.data.hugging_face import V3
from tests.integration.containers import KEEP_ALL, TEXT, TYPED, CannotHold, Record, as_text, lines

tried: collections.Counter[str] = collections.Counter()
NO_SHRINKING = (Phase.explicit, Phase.generate)  # a smaller example would take minutes to find
DRAWN = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None, phases=NO_SHRINKING)


@pytest.fixture(scope="module", autouse=True)
def say_counts() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    print(f"\nfiles: {tried.total()}", *(f"{name} {count}" for name, count in tried.most_common()), sep="\n  ")


@pytest.fixture(scope="module")
def mistral() -> Mistral:
    return Mistral(V3)


KEYS = st.sampled_from(["port", "buoy", "deep", "x y", "ü", "type"])
SCALARS = st.one_of(st.booleans(), st.integers(-(10**9), 10**9), st.sampled_from([0.5, -1.25, 7.0]), texts())


def values(nulls: bool) -> st.SearchStrategy[Any]:
    """JSON values, nested."""
    leaves = st.one_of(st.none(), SCALARS) if nulls else SCALARS
    return st.recursive(
        leaves, lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(KEYS, inner, max_size=2)), max_leaves=6
    )


@st.composite
def tool_records(draw: st.DrawFn, nulls: bool) -> Record:
    """A conversation with a call whose arguments are an object, and tools with a nested schema."""
    arguments = draw(st.dictionaries(KEYS, values(nulls), max_size=3))
    properties = draw(st.dictionaries(KEYS, st.fixed_dictionaries({"type": st.sampled_from(["string", "integer"])}), max_size=3))
    schema = {"type": "object", "properties": properties, "required": sorted(properties)}
    call = {"id": "abcde1234", "type": "function", "function": {"name": draw(st.sampled_from(NAMES)), "arguments": arguments}}
    weight = draw(st.sampled_from([{}, {"weight": 1}, {"weight": 1.0}]))
    messages = [
        {"role": "user", "content": draw(texts(1))},
        {"role": "assistant", "tool_calls": [call], **weight},
        {"role": "tool", "tool_call_id": "abcde1234", "name": call["function"]["name"], "content": "5"},
        {"role": "assistant", "content": draw(texts(1)), **weight},
    ]
    function = {"name": call["function"]["name"], "description": draw(texts()), "parameters": schema}
    return {"messages": messages, "tools": [{"type": "function", "function": function}]}


@st.composite
def flagged_parts(draw: st.DrawFn) -> Record:
    """A conversation whose contents are parts, of which some have flags."""
    flags = st.fixed_dictionaries({}, optional={"train": st.booleans(), "weight": st.sampled_from([0, 1.0])})
    parts = draw(
        st.lists(st.builds(lambda text, flag: {"type": "text", "text": text, **flag}, texts(1), flags), min_size=1, max_size=3)
    )
    question = [{"type": "text", "text": draw(texts(1))}]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": parts}]}


@st.composite
def flagged_ranges(draw: st.DrawFn) -> Record:
    """A conversation with ranges of characters that are trained on."""
    text = draw(texts(2))
    cut = draw(st.integers(1, len(text) - 1))
    detail = [{"begin_offset": 0, "end_offset": cut - 1, "train": draw(st.booleans())}]
    if draw(st.booleans()):
        detail.append({"begin_offset": cut, "end_offset": len(text) - 1, "train": draw(st.booleans())})
    question = {"role": "user", "content": draw(texts(1))}
    return {"messages": [question, {"role": "assistant", "content": text, "train_detail": detail}]}


def answers(label: bool, as_messages: bool) -> st.SearchStrategy[Record]:
    """Preference pairs, or labelled answers: texts, or lists of messages with flags."""
    flags = st.fixed_dictionaries({}, optional={"weight": st.sampled_from([0, 1, 0.0, 1.0, True]), "train": st.booleans()})
    prompt: st.SearchStrategy[Any] = texts(1)
    answer: st.SearchStrategy[Any] = texts(1)
    if as_messages:
        prompt = prompt.map(lambda text: [{"role": "user", "content": text}])
        answer = st.builds(lambda text, flag: [{"role": "assistant", "content": text, **flag}], texts(1), flags)
    columns = {"completion": answer, "label": st.booleans()} if label else {"chosen": answer, "rejected": answer}
    beside = {"system": texts(), "tools": st.just([]), "reasoning_effort": st.sampled_from(["none", "high"])}
    return st.fixed_dictionaries({"prompt": prompt, **columns}, optional=beside)


SCHEMAS = st.dictionaries(KEYS, values(nulls=False), min_size=1, max_size=2)
FORMATS = st.builds(lambda schema: {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}, SCHEMAS)
SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "reasoning_effort": st.sampled_from(["none", "high"]),
    "response_format": FORMATS,
    "chat_template_kwargs": SCHEMAS,
    "system": texts(1),
}
HISTORY: dict[str, st.SearchStrategy[Any]] = {
    "history": st.lists(st.tuples(texts(1), texts(1)).map(list), max_size=2),
    "input": texts(),
    "context": texts(),
    "system": texts(),
}
CHAT = config.ChatRecord(name="chat")
KINDS: dict[str, tuple[config.Record, st.SearchStrategy[Record]]] = {
    "texts": (config.TextRecord(name="text"), st.fixed_dictionaries({"text": texts(1)}, optional={"id": st.integers(0, 9)})),
    "completions": (
        config.CompletionRecord(name="completion"),
        st.fixed_dictionaries({"prompt": texts(1), "completion": texts(1)}),
    ),
    "completions with more": (
        config.CompletionRecord(name="completion"),
        st.fixed_dictionaries({"prompt": texts(1), "completion": texts(1)}, optional=HISTORY),
    ),
    "pairs of texts": (config.PreferenceRecord(name="preference"), answers(label=False, as_messages=False)),
    "pairs of messages": (config.PreferenceRecord(name="preference"), answers(label=False, as_messages=True)),
    "labelled texts": (config.LabelledRecord(name="labelled"), answers(label=True, as_messages=False)),
    "labelled messages": (config.LabelledRecord(name="labelled"), answers(label=True, as_messages=True)),
    "settings": (CHAT, st.builds(operator.or_, conversations(tools=False), st.fixed_dictionaries({}, optional=SETTINGS))),
    "chats": (CHAT, conversations(tools=False)),
    "parts with flags": (CHAT, flagged_parts()),
    "ranges with flags": (CHAT, flagged_ranges()),
    "calls with text": (CHAT, conversations(tools=True)),
    "calls with objects": (CHAT, tool_records(nulls=False)),
    "calls with objects and nulls": (CHAT, tool_records(nulls=True)),
}


def normal_forms(path: Path, record: config.Record) -> list[Any]:
    """What normalise makes of the records of a file; the words of a refusal where it refuses one."""
    source = config.FileSource(name="files", files=(str(path),), record=record)
    return [normal_form(fields, record) for _, fields in open_source(source)]


def normal_form(fields: Record, record: config.Record) -> Any:
    try:
        return normalise(fields, record)
    except ValueError as error:
        return str(error)


def without_order(value: Any) -> Any:
    """A normal form with its arguments decoded: a struct has the keys of objects in an order of its own."""
    if isinstance(value, dict):
        return {key: json.loads(item) if key == "arguments" else without_order(item) for key, item in value.items()}
    return [without_order(item) for item in value] if isinstance(value, list | tuple) else value


def assert_equal(
    containers: dict[str, Any], records: Sequence[Record], record: config.Record, expected: list[Any], ordered: bool
) -> None:
    for name, write in containers.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                path = write(records, Path(folder))
            except CannotHold:
                tried["cannot hold the records"] += 1
                continue
            tried[name] += 1
            found = normal_forms(path, record)
            assert without_order(found) == without_order(expected), name
            if ordered:
                assert json.dumps(found) == json.dumps(expected), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_container_gives_the_same_normal_form(kind: str, request: pytest.FixtureRequest) -> None:
    record, strategy = KINDS[kind]

    @settings(DRAWN, max_examples=150 if request.config.getoption("--slow") else 6)
    @given(st.lists(strategy, min_size=1, max_size=4))
    def compare(records: list[Record]) -> None:
        expected = [normal_form(fields, record) for fields in records]
        assert_equal(KEEP_ALL, records, record, expected, ordered=True)
        assert_equal(TYPED, records, record, expected, ordered=False)
        texts_of_records = [normal_form(as_text(fields), record) for fields in records]
        assert_equal(TEXT, records, record, texts_of_records, ordered=True)

    compare()


SUMMARY = ("records", "shapes", "examples", "tokens", "loss_tokens", "problem_counts")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("pairs of texts", "labelled texts", "labelled messages")])
def test_the_check_and_its_corrected_copy_say_the_same_of_every_container(
    kind: str, mistral: Mistral, request: pytest.FixtureRequest
) -> None:
    _, strategy = KINDS[kind]

    def summary(path: Path, fix: Path) -> tuple[dict[str, Any], list[bytes]]:
        answer = check_data([CheckedSource((str(path),))], mistral, CheckSettings(fix=fix))
        copies = sorted(file for file in fix.rglob("*") if file.is_file() and file.name != "changes.log")
        return {name: answer[name] for name in SUMMARY}, [canonical(file.read_bytes()) for file in copies]

    def canonical(content: bytes) -> bytes:
        return lines([without_nulls(json.loads(line)) for line in content.splitlines()])

    @settings(DRAWN, max_examples=25 if request.config.getoption("--slow") else 2)
    @given(st.lists(strategy, min_size=1, max_size=3))
    def compare(records: list[Record]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            expected = None
            for name, write in KEEP_ALL.items():
                folder = Path(scratch) / name
                folder.mkdir()
                found = summary(write(records, folder), folder / "fixed")
                expected = expected or found
                assert found == expected, name

    compare()


def without_nulls(record: Record) -> Record:
    """A record without the columns that another record of its table has, and without an order of columns of its own."""
    return {key: value for key, value in sorted(record.items()) if value is not None}
