"""A correction is never a guess: what is changed, left or dropped, and that the copy means one thing throughout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_train import config
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral
from tests.data.check.samples import ANSWER, USER, Write, check_files

FIXABLE = {"messages": [USER, ANSWER, USER]}
CUT = {"messages": [USER, ANSWER]}


def fixed(tokenizer: HuggingFace | Mistral, path: Path, **settings: Any) -> tuple[dict[str, Any], list[Any], list[dict[str, Any]]]:
    out = path.parent / "out"
    answer = check_files(tokenizer, path, fix=out, **settings)
    copy = (out / path.name).read_text() if (out / path.name).exists() else ""
    changes = (out / "changes.log").read_text()
    return answer["fixed"], [json.loads(line) for line in copy.splitlines()], [json.loads(line) for line in changes.splitlines()]


@pytest.mark.parametrize(
    "record",
    [FIXABLE | {"id": 7}, {"messages": [USER | {"turn": 1}, ANSWER, USER]}, {"text": "a\0", "meta": {"a": 1}}],
)
def test_a_record_with_unread_keys_is_not_changed(v3: Mistral, write_lines: Write, record: dict[str, Any]) -> None:
    counts, copy, changes = fixed(v3, write_lines("a.jsonl", [record]))
    assert counts["changed"] == 0 and copy in ([], [record])
    assert "is not read: --ignore" in changes[0]["what"]


def test_it_is_if_these_are_ignored_by_name(v3: Mistral, write_lines: Write) -> None:
    counts, copy, _ = fixed(v3, write_lines("a.jsonl", [FIXABLE | {"id": 7}]), ignore=("id",))
    assert counts["changed"] == 1 and copy == [CUT | {"id": 7}]


@pytest.mark.parametrize(
    "pair",
    [
        {"messages": [USER, ANSWER, USER], "label": False},
        {"prompt": "a\0", "chosen": "b", "rejected": "c"},
    ],
)  # fmt: skip
def test_no_turn_of_a_pair_is_cut(v3: Mistral, write_lines: Write, pair: dict[str, Any]) -> None:
    counts, copy, changes = fixed(v3, write_lines("a.jsonl", [pair]))
    assert counts["changed"] == 0 and copy == [] and changes[-1]["action"] == "dropped"


def test_a_pair_whose_prompt_has_turns_of_the_assistant_is_kept(v3: Mistral, write_lines: Write) -> None:
    prompt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]
    pair = {"conversations": prompt, "chosen": {"from": "gpt", "value": "d"}, "rejected": {"from": "gpt", "value": "e"}}
    counts, copy, changes = fixed(v3, write_lines("a.jsonl", [pair]))
    assert copy == [pair] and counts["kept"] == 1 and not changes


@pytest.mark.parametrize(
    "record", [{"text": "<p>The <s>old</s> price</p>"}, {"messages": [USER, ANSWER | {"content": "a </s> b"}]}]
)
def test_what_training_takes_is_kept(v3: Mistral, write_lines: Write, record: dict[str, Any]) -> None:
    counts, copy, changes = fixed(v3, write_lines("a.jsonl", [record]))
    assert copy == [record] and (counts["kept"], counts["left"], counts["dropped"]) == (1, 1, 0)
    assert changes[0]["action"] == "left" and changes[0]["rule"] == "control-token"


def test_a_correction_beside_what_training_takes(v3: Mistral, write_lines: Write) -> None:
    answer = ANSWER | {"content": "a </s> b"}
    counts, copy, _ = fixed(v3, write_lines("a.jsonl", [{"messages": [USER, answer, USER]}]))
    assert counts["changed"] == 1 and copy == [{"messages": [USER, answer]}]


def test_the_copy_is_read_by_the_section_that_read_the_file(v3: Mistral, write_lines: Write) -> None:
    section = config.ChatRecord(name="chat", column="talk", role="who", content="says")
    talk = [{"who": "user", "says": "a"}, {"who": "assistant", "says": "b"}]
    path = write_lines("a.jsonl", [{"talk": talk}, {"talk": [*talk, {"who": "user", "says": "c"}]}])
    counts, copy, _ = fixed(v3, path, record=section)
    assert counts["changed"] == 1 and copy == [{"talk": talk}] * 2
    again = check_files(v3, path.parent / "out" / "a.jsonl", record=section)
    assert again["problems"] == [] and again["records"] == 2


def test_completions_stay_completions(v3: Mistral, write_lines: Write) -> None:
    good = {"prompt": "a", "context": "c", "completion": "b"}
    completions = [{"prompt": "a", "completion": "b\0"}, good | {"completion": "d\0"}, good | {"context": "\0"}]
    path = write_lines("a.jsonl", [good, *completions])
    counts, copy, changes = fixed(v3, path)
    edited = [{"prompt": "a", "completion": "b\ufffd"}, good | {"completion": "d\ufffd"}]
    assert copy == [good, *edited, good | {"context": "\0"}]
    assert counts["changed"] == 2 and counts["left"] == 1 and "no place in its columns" in changes[-1]["what"]


def test_an_object_as_arguments_is_no_fault(v3: Mistral, write_lines: Write) -> None:
    calls: list[dict[str, Any]] = []
    for arguments in ({"a": 1}, '{"a": 1}'):
        call = {"id": "aaaaaaaa1", "type": "function", "function": {"name": "add", "arguments": arguments}}
        calls.append({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]})
    counts, copy, changes = fixed(v3, write_lines("a.jsonl", calls))
    assert copy == calls and changes == [] and counts["kept"] == 2


def test_a_dry_run_counts_the_same_and_writes_nothing(v3: Mistral, write_lines: Write, tmp_path: Path) -> None:
    path = write_lines("a.jsonl", [FIXABLE, CUT, {"text": "x </s> y"}, {"text": ""}] + [FIXABLE | {"n": n} for n in range(20)])
    planned = check_files(v3, path, dry_run=True, num_listed=3)["fixed"]
    assert list(tmp_path.iterdir()) == [path]
    written = check_files(v3, path, fix=tmp_path / "out")["fixed"]
    assert planned | {"directory": None} == written | {"directory": None, "changes": planned["changes"]}
    assert [change["action"] for change in planned["changes"]] == ["changed", "left", "dropped"] + ["dropped"] * 3
    with pytest.raises(ValueError, match="leave out --sample or --dry-run"):
        check_files(v3, path, dry_run=True, sample=1)
