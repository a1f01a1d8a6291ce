"""The date, the reasoning effort and the longest stretch of `data check FILES` and `data show FILE`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.cli.command import run
from tests.data.check.samples import CHAT, Write
from tests.data.hugging_face import small_tekken

DATED = "{{ strftime_now('%d %B %Y') }}: {% for m in messages %}{{ m.content + '</s>' }}{% endfor %}"
EFFORT = (
    "{% if reasoning_effort %}effort {{ reasoning_effort }} {% endif %}{% for m in messages %}{{ m.content + '</s>' }}{% endfor %}"
)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The text of the tokens that `data show` prints."""
    assert run("data", "show", *arguments, "--json") == 0
    segments: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return "".join(token["text"] for segment in segments for token in segment["tokens"])


def test_the_date_of_files(tokenizer: HuggingFace, write_lines: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (template := tmp_path / "t.jinja").write_text(DATED)
    arguments = (write_lines("a.jsonl", [CHAT]), "--tokenizer", tokenizer.path, "--chat-template", template)
    assert "29 February 2024: " in shown(capsys, *arguments, "--chat-date", "2024-02-29")
    for command in ("check", "show"):
        for options, said in (
            (("--chat-date", "soon"), "--chat-date soon is no date; write it as 2026-11-30"),
            (
                ("--chat-date", "2024-02-29", "--chat-template", "chatml"),
                "--chat-date would have no effect: the chat template reads",
            ),
        ):
            assert run("data", command, *arguments, *options) == 2
            assert said in capsys.readouterr().err


def test_the_reasoning_effort_of_files(
    tokenizer: HuggingFace, write_lines: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (template := tmp_path / "t.jinja").write_text(EFFORT)
    file = write_lines("a.jsonl", [CHAT, CHAT | {"reasoning_effort": "low"}])
    arguments = (file, "--tokenizer", tokenizer.path, "--chat-template", template)
    text = shown(capsys, *arguments, "--reasoning-effort", "high")
    assert text.count("effort high ") == text.count("effort low ") == 1
    tokens = []
    for options in ((), ("--reasoning-effort", "high"), ("--reasoning-effort", "high", "--map", "messages=messages")):
        assert run("data", "check", *arguments, *options, "--json") == 0
        tokens.append(json.loads(capsys.readouterr().out)["tokens"])
    assert tokens[0] < tokens[1] == tokens[2]
    assert run("data", "check", *arguments, "--chat-template", "chatml", "--reasoning-effort", "high") == 2
    assert "--reasoning-effort high: the chat template does not read it; leave it out" in capsys.readouterr().err
    v15 = ("--tokenizer", small_tekken(tmp_path, "v15"))
    assert run("data", "check", write_lines("c.jsonl", [CHAT]), *v15, "--reasoning-effort", "high") == 0
    assert run("data", "check", write_lines("c.jsonl", [CHAT]), *v15, "--reasoning-effort", "low") == 2
    assert "has none, high" in capsys.readouterr().err
    texts = write_lines("b.jsonl", [{"text": "one"}])
    assert run("data", "show", texts, "--tokenizer", tokenizer.path, "--reasoning-effort", "high") == 2
    assert "--reasoning-effort" in capsys.readouterr().err


def test_the_longest_stretch(tokenizer: HuggingFace, write_lines: Write, capsys: pytest.CaptureFixture[str]) -> None:
    messages = [{"role": "user", "content": "a" * 300}, {"role": "assistant", "content": "b"}]
    file = write_lines("a.jsonl", [{"messages": messages}, CHAT, {"text": "c" * 300}, {"text": "d e " * 100}])
    for options, counts in (((), {}), (("--longest-stretch", "200"), {"stretch": 2})):
        run("data", "check", file, "--tokenizer", tokenizer.path, *options, "--allow", "mixed-kinds", "--json")
        assert json.loads(capsys.readouterr().out)["problem_counts"] == counts
    assert run("data", "show", file, "--tokenizer", tokenizer.path, "--longest-stretch", "200", "-n", "1") == 2
    assert "a.jsonl:1: the text has" in capsys.readouterr().err
