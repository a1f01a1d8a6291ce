"""The check of data: what it finds and where, what it counts, the copy that it corrects, and its command."""

from __future__ import annotations

import collections
import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mistral_common
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from moe_train import config
from moe_train.cli import main
from moe_train.data.batches.packing import make_plan
from moe_train.data.chat.conversation_to_tokens import examples
from moe_train.data.check import check as checks
from moe_train.data.check import corrected
from moe_train.data.check.check import Settings, Source, check, sources_of
from moe_train.data.records import json_array, json_lines
from moe_train.data.records.conversation import Conversation, normalise, recognise
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral

Write = Callable[..., Path]
DATA = Path(mistral_common.__file__).parent / "data"
USER = {"role": "user", "content": "What is 2 + 3?"}
ANSWER = {"role": "assistant", "content": "It is 5."}
CHAT = {"messages": [USER, ANSWER]}
TOOL = {"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object", "properties": {}}}}
WITH_TOOLS = {
    "messages": [
        USER,
        {
            "role": "assistant",
            "tool_calls": [{"id": "aaaaaaaa1", "type": "function", "function": {"name": "add", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "5", "tool_call_id": "aaaaaaaa1"},
        ANSWER,
    ],
    "tools": [TOOL],
}
KINDS = [{"text": "The quick brown fox"}, CHAT, {"question": "2 + 3?", "answer": "5"}, {"prompt": "a", "completion": "b"}]


def asked(tokenizer: HuggingFace | Mistral, *files: Path, record: config.Record | None = None, **settings: Any) -> dict[str, Any]:
    settings.setdefault("template", tokenizer.chat_template)
    return check([Source(tuple(map(str, files)), record=record)], tokenizer, Settings(**settings))


@pytest.fixture(scope="module")
def v3() -> Mistral:
    return Mistral(DATA / "mistral_instruct_tokenizer_240323.model.v3")


def test_a_clean_file(tokenizer: HuggingFace, write_lines: Write) -> None:
    answer = asked(tokenizer, write_lines("a.jsonl", [*KINDS, {"messages": [USER, ANSWER, USER, ANSWER]}]))
    assert answer["problems"] == [] and answer["records"] == 5 and answer["records_with_problems"] == 0
    assert answer["shapes"] == {"chat": 2, "completion": 2, "text": 1}
    assert answer["examples"] == 5 and answer["truncation"] is None and answer["packing"] is None and answer["overlap"] is None


def test_tokens_are_those_of_training(tokenizer: HuggingFace, v3: Mistral, write_lines: Write) -> None:
    for one, records in ((tokenizer, KINDS), (v3, [*KINDS, WITH_TOOLS])):
        tokens = loss = 0
        lengths = []
        for record in records:
            read = normalise(record, recognise(record))
            if isinstance(read, Conversation):
                made = examples(read, one.chat_template, one)
                loss += sum(sum(example.loss_mask[1:]) for example in made)
                lengths += [len(example.tokens) for example in made]
            else:
                lengths.append(1 + len(one.encode(read)) + 1)  # bos, eos
                loss += lengths[-1] - 1
        tokens = sum(lengths)
        answer = asked(one, write_lines("a.jsonl", records))
        assert (answer["examples"], answer["tokens"], answer["loss_tokens"]) == (len(lengths), tokens, loss)
        assert answer["lengths"]["max"] == max(lengths)
        bins = collections.Counter(max(1, 2 ** int(np.ceil(np.log2(n)))) for n in lengths)
        assert {b["up_to"]: b["examples"] for b in answer["lengths"]["histogram"] if b["examples"]} == bins


LINES: list[tuple[bytes, str | None]] = [
    (b'{"text": "a"}', None),
    (b'{"text": "a"', "not-json"),
    (b"[1, 2]", "not-a-record"),
    (b"", None),
    (b'{"text": "\xff"}', "not-utf-8"),
    (b'{"text": "a\\ud800"}', "unicode"),
    (b'{"text": 3}', "type"),
    (b'{"text": ""}', "empty-text"),
    (b'{"text": "a", "content": "b"}', "text-and-content"),
    (b'{"body": "a"}', "columns"),
    (b'{"text": "x </s> y"}', "control-token"),
    (json.dumps({"messages": [USER | {"role": "narrator"}, ANSWER]}).encode(), "role"),
    (json.dumps({"messages": [USER, ANSWER | {"content": ""}]}).encode(), "empty-assistant"),
    (json.dumps({"messages": [USER, {"role": "system", "content": "s"}, ANSWER]}).encode(), "system-first"),
    (json.dumps({"messages": [USER, USER, ANSWER]}).encode(), "role-order"),
    (json.dumps({"messages": [USER, ANSWER, USER]}).encode(), "last-turn"),
    (json.dumps({"messages": [USER, ANSWER | {"weight": 2}]}).encode(), "weight"),
    (json.dumps({"messages": [USER, ANSWER | {"weight": 0}]}).encode(), "no-loss"),
    (json.dumps({"messages": [USER, ANSWER | {"content": "word " * 200}]}).encode(), "too-long"),
    (json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}).encode(), "columns"),
]


def test_every_problem_has_its_file_line_rule_and_remedy(tokenizer: HuggingFace, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in LINES))
    answer = asked(tokenizer, path, seq_len=128)
    expected = [(f"{path}:{i}", rule) for i, (_, rule) in enumerate(LINES, start=1) if rule]
    assert [(problem["where"], problem["rule"]) for problem in answer["problems"]] == expected
    assert all(problem["file"] == str(path) and problem["remedy"] and problem["message"] for problem in answer["problems"])
    assert [problem["line"] for problem in answer["problems"]] == [i for i, (_, rule) in enumerate(LINES, start=1) if rule]
    assert answer["records"] == len([line for line, _ in LINES if line])
    assert answer["records_with_problems"] == len(expected)
    assert answer["problem_counts"] == collections.Counter(rule for _, rule in expected)
    assert set(answer["problem_counts"]) <= checks.RULES


def test_a_rule_may_be_broken_where_that_is_allowed(tokenizer: HuggingFace, write_lines: Write) -> None:
    path = write_lines("a.jsonl", [{"text": "x </s> y"}, {"text": 3}])
    assert asked(tokenizer, path, allowed=frozenset({"control-token"}))["problem_counts"] == {"type": 1}
    with pytest.raises(ValueError, match=r"there is no rule control; the rules are .*control-token"):
        asked(tokenizer, path, allowed=frozenset({"control"}))


def test_of_many_problems_some_are_named_and_all_counted(tokenizer: HuggingFace, write_lines: Write) -> None:
    path = write_lines("a.jsonl", [{"text": 3}] * 30 + [{"text": ""}] * 2)
    answer = asked(tokenizer, path, shown=4)
    assert answer["problem_counts"] == {"type": 30, "empty-text": 2}
    assert [problem["line"] for problem in answer["problems"]] == [1, 2, 3, 4, 31, 32]


def test_an_empty_file_is_not_passed_over(tokenizer: HuggingFace, tmp_path: Path) -> None:
    for name, content in (
        ("a.jsonl", b""),
        ("b.jsonl", b"\n\n"),
        ("c.json", b"[]"),
        ("d.csv", b"text\n"),
        ("e.jsonl.gz", gzip.compress(b"")),
    ):
        (tmp_path / name).write_bytes(content)
    answer = asked(tokenizer, tmp_path)
    assert answer["problem_counts"] == {"empty-file": 5} and answer["records"] == 0


def test_every_format_is_found_in_a_folder(tokenizer: HuggingFace, tmp_path: Path, write_lines: Write) -> None:
    lines = write_lines("a.jsonl", [CHAT]).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.json").write_text(json.dumps([CHAT, CHAT]))
    (tmp_path / "d.csv").write_text("question,answer\n2 + 3?,5\n")
    (tmp_path / "e.txt").write_text("Once.\n")
    pyarrow.parquet.write_table(pa.Table.from_pylist([CHAT, {"messages": []}]), tmp_path / "f.parquet")
    answer = asked(tokenizer, tmp_path)
    assert answer["files"] == 6 and answer["records"] == 8
    assert answer["shapes"] == {"chat": 5, "completion": 1, "text": 1}
    assert [problem["where"] for problem in answer["problems"]] == [f"{tmp_path / 'f.parquet'}: row 2"]


def test_columns_by_a_mapping(tokenizer: HuggingFace, write_lines: Write) -> None:
    path = write_lines("a.jsonl", [{"ask": "2 + 3?", "say": "5"}])
    assert asked(tokenizer, path)["problem_counts"] == {"columns": 1}
    assert asked(tokenizer, path, record=checks.section_of(["prompt=ask", "completion=say"]))["problems"] == []
    assert checks.section_of(["messages=x"]) == config.ChatRecord(name="chat", column="x")
    assert checks.section_of(["text=x"]) == config.TextRecord(name="text", column="x")
    assert checks.section_of([]) is None
    for wrong in (["prompt=a"], ["text=a", "messages=b"], ["text"], ["body=a"]):
        with pytest.raises(ValueError, match=r"--map .* should be"):
            checks.section_of(wrong)


# --- figures ---------------------------------------------------------------------------------------------------


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
    answer = asked(tokenizer, write_lines("a.jsonl", texts + turns), seq_len=100, batch_size=4, bench=tmp_path / "bench.json")
    rows = sum(plan.num_rows for plan in plans)
    assert answer["packing"] == {
        "rows": rows,
        "efficiency": round(sum(plan.num_tokens for plan in plans) / rows / 100, 4),
        "batch_size": 4,
        "steps_per_epoch": -(-rows // 4),
        "seconds_per_epoch": -(-rows // 4),
    }
    over = [n - 100 for n in lengths + chats if n > 100]
    assert answer["truncation"] == {"seq_len": 100, "examples_longer": len(over), "tokens_beyond": sum(over)}
    assert answer["problem_counts"] == {"too-long": sum(n > 100 for n in chats)}  # texts are split


def test_a_bench_that_is_none(tokenizer: HuggingFace, write_lines: Write, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bench\.json has no tokens_per_second; write it with: moe-train bench"):
        asked(tokenizer, write_lines("a.jsonl", KINDS), bench=tmp_path / "bench.json")


def test_duplicates_and_overlap(tokenizer: HuggingFace, write_lines: Write) -> None:
    words = [f"w{n}" for n in range(400)]
    story, other = " ".join(words[:200]), " ".join(words[200:])
    near = story.replace("w100 ", "changed ").upper()
    system = {"role": "system", "content": " ".join(words)}  # that two records share it makes them no twins
    chats = [{"messages": [system, USER | {"content": f"Question {n}?"}, ANSWER | {"content": str(n)}]} for n in range(3)]
    path = write_lines("a.jsonl", [{"text": story}, {"text": other}, {"text": near}, {"text": other}, *chats])
    held_out = write_lines(
        "eval.jsonl",
        [
            {"question": "Who? " + " ".join(words[250:263]), "answer": "No one."},
            {"text": "too short a text"},
            {"text": "unseen " * 30},
        ],
    )
    answer = asked(tokenizer, path, against=(Source((str(held_out),)),))
    assert (answer["duplicates"]["exact"], answer["duplicates"]["near"]) == (1, 1)
    assert [(twin["where"], twin["like"]) for twin in answer["duplicates"]["examples"]] == [
        (f"{path}:4", f"{path}:2"),
        (f"{path}:3", f"{path}:1"),
    ]
    assert answer["overlap"] == {
        "records": 2,
        "evaluation_records": 1,
        "of": 3,
        "words": 13,
        "examples": [f"{path}:2", f"{path}:4"],
    }
    one_word_less = write_lines("less.jsonl", [{"text": " ".join(words[250:262]) + " and so on"}])
    assert asked(tokenizer, path, against=(Source((str(one_word_less),)),))["overlap"]["records"] == 0
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: no column"):
        asked(tokenizer, path, against=(Source((str(write_lines("bad.jsonl", [{"x": 1}])),)),))


# --- tools -----------------------------------------------------------------------------------------------------


def test_tools_under_a_tokenizer_without_tool_tokens_stop(tokenizer: HuggingFace, v3: Mistral, write_lines: Write) -> None:
    path = write_lines("a.jsonl", [CHAT, WITH_TOOLS])
    answer = asked(v3, path)
    assert answer["problems"] == [] and answer["shapes"] == {"chat": 1, "chat with tools": 1} and answer["examples"] == 3
    for without in (Mistral(DATA / "tokenizer.model.v1"), tokenizer):
        with pytest.raises(
            ValueError, match=r"a\.jsonl:2: the record has tools, .*v3, v7.*moe-train extend-vocab BASE OUT --tokenizer v3"
        ):
            asked(without, path)


def test_conversations_without_a_template_stop(tokenizer: HuggingFace, write_lines: Write) -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the record is a conversation, .* has no chat template; .*--chat-template"):
        asked(tokenizer, write_lines("a.jsonl", [CHAT]), template=None)


# --- any number of processes, any size -------------------------------------------------------------------------


def varied(count: int) -> list[dict[str, Any]]:
    """Records of every kind, some bad, some twice."""
    made: list[dict[str, Any]] = []
    for n in range(count):
        text = " ".join(f"word{(n * k * k) % 997}" for k in range(5 + n % 60))
        kinds = [
            {"text": text},
            {"messages": [USER | {"content": text}, ANSWER | {"content": text[::-1]}]},
            {"messages": [USER, USER | {"content": text}, ANSWER]},
            {"question": text, "answer": text[:40] or "-"},
            {"text": 3},
        ]
        made.append(made[n // 2] if n % 17 == 5 else kinds[n % 5])
    return made


def test_any_number_of_processes_finds_the_same(
    tokenizer: HuggingFace, write_lines: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_WORTH_PROCESSES", 0)
    monkeypatch.setattr(json_lines, "BLOCK", 5000)
    monkeypatch.setattr(json_array, "BLOCK", 5000)
    paths = [write_lines("a.jsonl", varied(300)), write_lines("eval.jsonl", varied(4))]
    (tmp_path / "b.json").write_text(json.dumps(varied(300)[::-1]))
    settings = {"seq_len": 64, "batch_size": 2, "against": (Source((str(paths[1]),)),), "shown": 5}
    answers, copies = [], []
    for num_proc in (1, 2, 3):
        out = tmp_path / f"fixed-{num_proc}"
        answer = asked(tokenizer, paths[0], tmp_path / "b.json", num_proc=num_proc, fix=out, **settings)
        assert answer.pop("fixed")["directory"] == str(out)
        answers.append(answer)
        copies.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert answers[0] == answers[1] == answers[2] and answers[0]["records"] == 600
    assert answers[0]["duplicates"]["exact"] > 20 and answers[0]["overlap"]["records"] > 5
    assert copies[0] == copies[1] == copies[2]


def test_progress_ends_with_everything(tokenizer: HuggingFace, write_lines: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "BLOCK", 2000)
    path = write_lines("a.jsonl", varied(100))
    told: list[tuple[int, int, int]] = []
    check([Source((str(path),))], tokenizer, Settings(template=tokenizer.chat_template), lambda *done: told.append(done))
    assert told == sorted(told) and len(told) > 5
    assert told[-1] == (path.stat().st_size, path.stat().st_size, 100)


def test_a_sample_states_its_coverage(tokenizer: HuggingFace, write_lines: Write, tmp_path: Path) -> None:
    path = write_lines("a.jsonl", [{"text": f"record {n} " + "x" * (n % 13)} for n in range(2000)])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(path.read_bytes(), 0))
    whole = asked(tokenizer, path, sample=10**6)
    assert whole["sample"]["records"] <= 2000 and whole["sample"]["of_about"] == pytest.approx(2000, rel=0.02)
    answer = asked(tokenizer, path, sample=200)
    assert answer["sample"]["records"] == answer["records"] == pytest.approx(200, abs=5)
    assert answer["sample"]["of_about"] == pytest.approx(2000, rel=0.1) and answer["sample"]["share"] == pytest.approx(0.1, rel=0.1)
    assert answer["duplicates"] is None
    assert asked(tokenizer, path, sample=200) == answer
    both = asked(tokenizer, path, tmp_path / "b.jsonl.gz", sample=200)["sample"]
    assert both["only_begun"] == [str(tmp_path / "b.jsonl.gz")] and both["of_about"] is None
    with pytest.raises(ValueError, match="a sample cannot be fixed"):
        asked(tokenizer, path, sample=5, fix=tmp_path / "out")


def test_a_problem_in_a_sample_names_its_byte(tokenizer: HuggingFace, write_lines: Write) -> None:
    path = write_lines("a.jsonl", [{"text": n} for n in range(50)])
    answer = asked(tokenizer, path, sample=10)
    for problem in answer["problems"]:
        at = int(re.fullmatch(rf"{re.escape(str(path))}: byte (\d+)", problem["where"])[1])
        line = path.read_bytes()[at - 1 :].split(b"\n")[0]
        assert json.loads(line)["text"] == int(re.search(r"not (\d+)", problem["message"])[1])


# --- the corrected copy ----------------------------------------------------------------------------------------


def test_the_corrected_copy(tokenizer: HuggingFace, tmp_path: Path) -> None:
    source = tmp_path / "data" / "sub"
    source.mkdir(parents=True)
    good = b'{ "text":"kept as it is",  "id": 1 }'
    fixable = {"messages": [USER, USER, ANSWER, USER], "id": 2}
    lines = [good, *(line for line, _ in LINES), json.dumps(fixable).encode()]
    (source / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    (source.parent / "b.csv").write_text("question,answer,id\na\0b,5,7\n")
    before = {file: file.read_bytes() for file in source.parent.rglob("*.*")}
    out = tmp_path / "out"
    answer = asked(tokenizer, tmp_path / "data", seq_len=128, fix=out)
    assert {file: file.read_bytes() for file in source.parent.rglob("*.*")} == before
    assert sorted(str(file.relative_to(out)) for file in out.rglob("*.*")) == ["b.csv.jsonl", "changes.log", "sub/a.jsonl"]

    kept = (out / "sub" / "a.jsonl").read_bytes().splitlines()
    assert kept[:2] == [good, b'{"text": "a"}']
    assert json.loads(kept[-1]) == {"messages": [USER | {"content": "What is 2 + 3?\n\nWhat is 2 + 3?"}, ANSWER], "id": 2}
    assert json.loads((out / "b.csv.jsonl").read_text()) == {"question": "a\ufffdb", "answer": "5", "id": "7"}
    changes = [json.loads(line) for line in (out / "changes.log").read_text().splitlines()]
    assert {change["action"] for change in changes} == {"changed", "dropped"}
    assert all(set(change) == {"where", "action", "rule", "what"} for change in changes)
    dropped = {change["where"] for change in changes if change["action"] == "dropped"}
    changed = {change["where"] for change in changes if change["action"] == "changed"}
    assert answer["fixed"] == {"directory": str(out), "kept": len(kept) + 1, "changed": len(changed), "dropped": len(dropped)}
    assert len(kept) + 1 + len(dropped) == answer["records"]
    last = f"{source / 'a.jsonl'}:{len(lines)}"
    assert [change["rule"] for change in changes if change["where"] == last] == ["role-order", "last-turn"]

    again = asked(tokenizer, out, seq_len=128)
    assert again["problems"] == [] and again["records"] == answer["fixed"]["kept"]


def test_a_weight_is_corrected(tokenizer: HuggingFace, write_lines: Write, tmp_path: Path) -> None:
    path = write_lines("a.jsonl", [{"messages": [USER, ANSWER | {"weight": True}]}])  # which equals 1
    assert asked(tokenizer, path, fix=tmp_path / "out")["fixed"]["changed"] == 1
    assert (tmp_path / "out" / "a.jsonl").read_text() == json.dumps({"messages": [USER, ANSWER | {"weight": 1}]}) + "\n"


def test_a_copy_appears_whole_or_not_at_all(tokenizer: HuggingFace, write_lines: Write, tmp_path: Path) -> None:
    path = write_lines("a.jsonl", [CHAT, WITH_TOOLS])
    with pytest.raises(ValueError, match="the record has tools"):
        asked(tokenizer, path, fix=tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(FileExistsError):
        asked(tokenizer, path, fix=tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_names_of_copies() -> None:
    paths = ["/d/a.jsonl", "/d/a.jsonl.gz", "/d/x/b.parquet", "/d/x/b.txt.zst"]
    assert corrected._copy_names([Path(path) for path in paths]) == [
        *("a.jsonl", "a-2.jsonl", "x/b.parquet.jsonl", "x/b.txt.jsonl")
    ]


# --- the command -----------------------------------------------------------------------------------------------


def run(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main.main(["data", "check", *map(str, arguments)])
    shown = capsys.readouterr()
    return int(caught.value.code or 0), shown.out, shown.err


def test_the_command(tokenizer: HuggingFace, write_lines: Write, capsys: pytest.CaptureFixture[str]) -> None:
    clean, bad = write_lines("a.jsonl", KINDS), write_lines("b.jsonl", [{"text": 3}])
    code, out, _ = run(clean, "--tokenizer", tokenizer.path, capsys=capsys)
    assert code == 0 and "with problems" in out
    code, out, _ = run(clean, bad, "--tokenizer", tokenizer.path, "--seq-len", "64", "--batch-size", "2", capsys=capsys)
    assert code == 1 and f"{bad}:1: column 'text' should be text, not 3" in out and "steps of 2 rows" in out
    code, out, _ = run(bad, "--tokenizer", tokenizer.path, "--json", capsys=capsys)
    assert code == 1 and json.loads(out)["problem_counts"] == {"type": 1}
    for arguments, said in (
        ((clean,), "state --tokenizer"),
        (("--tokenizer", tokenizer.path), "name files, or a run with --config"),
        ((clean, "--tokenizer", clean.parent), "no tokenizer at"),
        ((clean.parent / "no.jsonl", "--tokenizer", tokenizer.path), "no file matches"),
    ):
        code, out, err = run(*arguments, capsys=capsys)
        assert code == 2 and said in err and err.count("\n") == 1 and not out


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (config.PreparedSource(name="prepared", path="s3://sets/a"), "s3://sets/a is a prepared source.*manifest.json names"),
        (
            config.HubSource(name="hub", dataset="o/d", revision="0" * 40, record=config.TextRecord(name="text")),
            "o/d is a hub source, and not files of records.*its download",
        ),
    ],
)
def test_what_is_not_in_files_is_refused(source: config.Source, said: str) -> None:
    with pytest.raises(ValueError, match=f"^data: {said}"):
        sources_of([source])


def test_the_command_on_a_run(
    tokenizer: HuggingFace, write_lines: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines("a.jsonl", [{"ask": "2 + 3?", "say": "5 " * 100}, {"ask": "2 + 3?", "say": "5"}])
    held_out = write_lines("e.jsonl", [{"text": "5 " * 50}])
    run_yaml = tmp_path / "run.yaml"
    settings = {
        "name": "r",
        "run_dir": str(tmp_path / "runs"),
        "init_from": str(tmp_path),
        "data": {
            "tokenizer": {"name": "huggingface", "path": str(tokenizer.path)},
            "train": [
                {
                    "name": "files",
                    "files": [str(path)],
                    "record": {"name": "completion", "prompt": "ask", "completion": "say", "too_long": "truncate"},
                }
            ],
            "eval": [{"name": "files", "files": [str(held_out)], "record": {"name": "text"}}],
        },
        "train": {"steps": 1, "batch_size": 2, "seq_len": 64},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
    }
    run_yaml.write_text(json.dumps(settings))
    code, out, err = run("--config", run_yaml, "--json", capsys=capsys)
    answer = json.loads(out)
    assert code == 0, err
    assert answer["truncation"]["examples_longer"] == 1 and answer["problems"] == []  # the run says truncate
    assert answer["packing"]["batch_size"] == 2 and answer["packing"]["rows"] == 2
    assert answer["overlap"]["records"] == 1


def test_no_jax_is_imported(tokenizer: HuggingFace, write_lines: Write) -> None:
    arguments = ["data", "check", str(write_lines("a.jsonl", KINDS)), "--tokenizer", str(tokenizer.path)]
    script = (
        "import sys\nfrom moe_train.cli.main import main\n"
        f"try:\n    main({arguments})\nfinally:\n    assert 'jax' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0
