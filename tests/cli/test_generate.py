"""The commands that generate, with stand-ins for the model."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_train.commands.generate import GeneratedText, GenerationRequest
from moe_train.commands.text_generator import ChatSettings
from moe_train.data.records.media_parts import MediaKind
from moe_train.evaluate.generation.sampling import Sampling
from tests.cli.command import run


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[GenerationRequest]:
    """The requests that reach the model, which answers each prompt with its number."""
    received: list[GenerationRequest] = []

    def generate(_: Path, request: GenerationRequest) -> list[GeneratedText]:
        received.append(request)
        count = len(request.prompts) * request.samples
        return [GeneratedText(i // request.samples, f" {i}", [i], [-0.5], "max_tokens") for i in range(count)]

    monkeypatch.setattr("moe_train.commands.generate.generate", generate)
    return received


def test_generate_hands_on_its_options(requests: list[GenerationRequest], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max-tokens", "3", "--temperature", "0.5", "--top-k", "4", "--top-p", "0.9", "--seed", "7", "--n", "2"]
    assert run("generate", "runs/tiny", "--prompt", "a", "--prompt", "b", *options, "--stop", "x", "--json") == 0
    lines = json.loads(capsys.readouterr().out)
    assert [line["completion"] for line in lines] == [" 0", " 1", " 2", " 3"]
    assert lines[2] == {"prompt": "b", "completion": " 2", "stop": "max_tokens", "tokens": [2], "logprobs": [-0.5]}
    assert requests == [GenerationRequest(["a", "b"], Sampling(3, (), 0.5, 4, 0.9, seed=7), ("x",), 2)]
    assert run("generate", "runs/tiny", "--prompt", "a") == 0
    assert capsys.readouterr().out == "a 0\n"


def test_generate_reads_conversations_and_tools(
    requests: list[GenerationRequest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    (tmp_path / "tools.json").write_text(json.dumps([tool]))
    (tmp_path / "p.jsonl").write_text('{"id": 7, "messages": [{"role": "user", "content": "a"}]}\n{"prompt": "b"}\n')
    chat = ["--chat", "--chat-template", "chatml", "--system", "s", "--tools", str(tmp_path / "tools.json")]
    assert run("generate", "runs/tiny", "--prompt-file", str(tmp_path / "p.jsonl"), *chat) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'p.jsonl'}:1\n 0\n\nb\n 1\n"
    assert requests[0].chat == ChatSettings("chatml", None, "s", (tool,))
    out = tmp_path / "out.jsonl"
    assert run("generate", "runs/tiny", "--prompt-file", str(tmp_path / "p.jsonl"), "--chat", "--out", out) == 0
    assert capsys.readouterr().out == ""
    first = json.loads(out.read_text().splitlines()[0])
    assert first["id"] == 7 and first["location"] == f"{tmp_path / 'p.jsonl'}:1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "state --prompt TEXT, once or more, or --prompt-file FILE"),
        (["--prompt", "a", "--n", "2"], "--n 2 at temperature 0 would give the same text 2 times; set --temperature"),
        (["--prompt", "a", "--system", "s"], "--system has no effect on text to continue; add --chat"),
        (["--prompt", "a", "--top-p", "2", "--temperature", "1"], "top_p is 2.0; it must be above 0 and at most 1"),
        (["--prompt", "a", "--min-p", "0.1"], "min_p 0.1 has no effect at temperature 0"),
        (["--prompt-file", "absent.jsonl"], "absent.jsonl: no such file of prompts"),
        (["--prompt", "a", "--chat", "--tools", "absent.json"], "absent.json: no such file of tools"),
        (["--prompt", "a", "--out", __file__], "exists; name a new file"),
    ],
)
def test_a_request_that_makes_no_sense_is_one_line(
    options: list[str], message: str, requests: list[GenerationRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", "runs/tiny", *options) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not requests


class _Chat:
    def __init__(self, *_: Any) -> None:
        self.messages: list[Any] = []

    def answer(self, text: str) -> Iterator[str]:
        if text == "long":
            raise ValueError("the conversation has 99 tokens")
        self.messages.append(text)
        yield from (text.upper(), f" {len(self.messages)}")

    def attach(self, kind: MediaKind, file: str) -> None:
        if file == "none.png":
            raise ValueError("there is no picture none.png")
        self.messages.append([kind.part, file])

    def reset(self) -> None:
        self.messages.clear()


def test_chat_answers_line_by_line_through_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("moe_train.commands.chat.Chat", _Chat)
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n\nb\n/messages\n/what now\n/reset\nc\n/exit\nd\n"))
    assert run("chat", "runs/tiny") == 0
    out, err = capsys.readouterr()
    assert out == 'A 1\nB 2\n[\n  "a",\n  "b"\n]\nC 1\n'
    assert err == "moe-train: /what: no such command; use /image FILE, /audio FILE, /reset, /messages or /exit\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nlong"))
    assert run("chat", "runs/tiny") == 2
    assert "the conversation has 99 tokens" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("/image a picture.png\n/audio a.wav\nb\n/messages\n"))
    assert run("chat", "runs/tiny") == 0
    assert json.loads(capsys.readouterr().out.removeprefix("B 3")) == [["image", "a picture.png"], ["audio", "a.wav"], "b"]
    for line, message in (
        ("/image none.png", "no picture none.png"),
        ("/image ", "/image names no file"),
        ("/audio", "/audio names no file"),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{line}\na\n"))
        assert run("chat", "runs/tiny") == 2
        out, err = capsys.readouterr()
        assert not out and message in err and len(err.splitlines()) == 1
