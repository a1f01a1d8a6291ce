"""What is shown is what is trained on: the same ids, masks, segments and positions as the loader's."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from moe_train import config
from moe_train.cli.main import app
from moe_train.commands import show
from moe_train.data.batches.batch import Batch, BatchRows
from moe_train.data.batches.loader import Loader
from moe_train.data.chat.conversation_to_tokens import examples
from moe_train.data.chat.example import Example
from moe_train.data.records.normal_form import Conversation
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral
from tests.data.chat import trajectories
from tests.data.hugging_face import V3, small_tekken

CHAT, TEXT = config.ChatRecord(name="chat", too_long="truncate"), config.TextRecord(name="text")
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Pariş"}'}}
WITH_TOOLS = {
    "messages": [
        {"role": "user", "content": "Weather in Pariş?"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "18 C"},
        {"role": "assistant", "content": "It is 18 degrees."},
    ],
    "tools": [{"type": "function", "function": {"name": "weather", "description": "", "parameters": {}}}],
}


def chats(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} + {i}? [INST] 東京"},
                {"role": "assistant", "content": f"It is {2 * i}." * (1 + i % 5), "weight": i % 2},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "Yes 🙂"},
            ]
        }
        for i in range(count)
    ]


def loaded(file: Path, record: config.Record, tokenizer: HuggingFace | Mistral, cache: Path, seq_len: int) -> Batch:
    """All rows of the loader's evaluation on a file, which come in order."""
    source = config.FileSource(name="files", files=(str(file),), record=record)
    data = config.Data(train=(source,), eval=(source,), cache_dir=str(cache))
    loader = Loader(data, "eval", tokenizer, BatchRows(2, seq_len), seed=0)
    batches = [loader.batch(step) for step in range(loader.batches or 0)]
    return Batch(*(np.concatenate(arrays)[: loader.num_rows] for arrays in zip(*batches, strict=True)))


@pytest.fixture(scope="module")
def mistral() -> Mistral:
    return Mistral(V3)


@pytest.mark.parametrize("seq_len", [40, 300])
@pytest.mark.parametrize("kind", ["text", "chat", "tools"])
def test_show_and_training_have_the_same_rows(
    kind: str, seq_len: int, tokenizer: HuggingFace, mistral: Mistral, tmp_path: Path, write_lines: Callable[..., Path]
) -> None:
    records = {
        "text": [{"text": "the quick brown fox " * (i % 7)} for i in range(20)],
        "chat": chats(20),
        "tools": [*chats(3), WITH_TOOLS, *chats(2)],
    }[kind]
    either = mistral if kind == "tools" else tokenizer
    record = TEXT if kind == "text" else CHAT
    file = write_lines("a.jsonl", records)
    trained = loaded(file, record, either, tmp_path / "cache", seq_len)
    source = config.FileSource(name="files", files=(str(file),), record=record)
    shown = show.rows_of_records(source, len(records), either, either.chat_template, seq_len)
    for name in Batch._fields:
        np.testing.assert_array_equal(getattr(shown.batch, name), getattr(trained, name), err_msg=name)
    assert trained.loss_mask.any() and (trained.segment_ids.max() > 1) == (seq_len == 300 or kind == "text")


@pytest.mark.parametrize("seq_len", [60, 300, 450, 5000])
def test_of_a_conversation_with_tools_that_is_too_long_the_turns_that_fit_are_kept(
    seq_len: int, tmp_path: Path, write_lines: Callable[..., Path]
) -> None:
    """Dropping leaves what it would leave of an example for each turn, in `data show` as in training."""
    tokenizer = Mistral(small_tekken(tmp_path, "v13"))
    conversations = [trajectories.agent(i, result=f"line {i}\n" * 9) for i in (3, 4, 9)]
    records = [*chats(1), *({"messages": made.messages, "tools": made.tools} for made in conversations)]
    file = write_lines("a.jsonl", records)
    record = config.ChatRecord(name="chat", too_long="drop")
    trained = loaded(file, record, tokenizer, tmp_path / "cache", seq_len)
    source = config.FileSource(name="files", files=(str(file),), record=record)
    shown = show.rows_of_records(source, len(records), tokenizer, None, seq_len)
    for name in Batch._fields:
        np.testing.assert_array_equal(getattr(shown.batch, name), getattr(trained, name), err_msg=name)
    found = trajectories.predictions([example for segment in show.segments(shown, tokenizer) for example in [_example(segment)]])
    plain = Conversation(records[0]["messages"], [])
    separate = examples(plain, None, tokenizer)
    for made in conversations:
        separate += trajectories.separate(made, None, tokenizer)
    assert found == trajectories.predictions([example for example in separate if len(example.tokens) <= seq_len + 1])


def _example(segment: show.ShownSegment) -> Example:
    return Example([token.id for token in segment.tokens], [token.trained_on for token in segment.tokens])


def test_a_runs_rows_are_its_loaders(tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path]) -> None:
    source = config.FileSource(name="files", files=(str(write_lines("a.jsonl", chats(30))),), record=CHAT)
    run = config.Config.model_validate(
        {
            "name": "r", "run_dir": str(tmp_path / "run"), "seed": 3, "optimizer": {"name": "adamw", "learning_rate": 1e-3},
            "model": {
                "family": "mistral", "vocab_size": 360, "model_dim": 8, "num_layers": 1, "ffn": {"name": "dense", "ffn_dim": 8},
                "attention": {"num_heads": 1, "num_kv_heads": 1, "head_dim": 8},
            },
            "data": config.Data(train=(source,), cache_dir=str(tmp_path / "cache")),
            "train": {"batch_size": 4, "seq_len": 128, "steps": 5},
        }
    )  # fmt: skip
    shown = show.rows_of_run(run, 3, tokenizer, step=2)
    assert run.data is not None
    loader = Loader(run.data, "train", tokenizer, BatchRows(4, 128), seed=3)
    for name in Batch._fields:
        np.testing.assert_array_equal(getattr(shown.batch, name), getattr(loader.batch(1), name)[:3])
    assert shown.notes is None
    first = next(show.segments(shown, tokenizer))
    assert re.fullmatch(r".*a\.jsonl:\d+", first.place)
    question = json.loads(Path(source.files[0]).read_text().splitlines()[int(first.place.rpartition(":")[2]) - 1])
    assert question["messages"][0]["content"] in "".join(token.text for token in first.tokens)


def test_the_segments_say_what_is_learnt(mistral: Mistral, write_lines: Callable[..., Path]) -> None:
    file = write_lines("a.jsonl", [WITH_TOOLS])
    source = config.FileSource(name="files", files=(str(file),), record=CHAT)
    call, answer = show.segments(show.rows_of_records(source, 3, mistral, None, None), mistral)
    assert (call.place, call.row, call.number, answer.number) == (f"{file}:1", 1, 1, 2)
    trained_on = ["".join(token.text for token in segment.tokens if token.trained_on) for segment in (call, answer)]
    assert trained_on == ['[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Pariş"}}]</s>', " It is 18 degrees.</s>"]
    assert [token.position for token in answer.tokens] == list(range(len(answer.tokens)))
    assert "".join(token.text for token in answer.tokens if token.control) == (
        "<s>[AVAILABLE_TOOLS][/AVAILABLE_TOOLS][INST][/INST][TOOL_CALLS]</s>[TOOL_RESULTS][/TOOL_RESULTS]</s>"
    )


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_the_pieces_are_the_text(tokenizer: HuggingFace, mistral: Mistral, text: str) -> None:
    for either, before in ((tokenizer, ""), (mistral, " " if text else "")):  # sentencepiece puts a space before a text
        pieces = show.token_texts([1, *either.encode(text), 2], either)
        assert (pieces[0], "".join(pieces[1:-1]), pieces[-1]) == ("<s>", before + text, "</s>")


def show_file(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["data", "show", *arguments])
    if result.exception:
        raise result.exception
    return result.output


def test_the_command(tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path]) -> None:
    bad = {"messages": [{"role": "user", "content": "a \x1b[31m<b>&"}, {"role": "assistant", "content": "<script>x</script>"}]}
    file = str(write_lines("a.jsonl", [bad, *chats(5)]))
    where = ["--tokenizer", str(tokenizer.path)]
    text = show_file(file, *where, "-n", "2")
    assert "a.jsonl:1" in text and "a.jsonl:2" in text and "a.jsonl:3" not in text
    assert "\x1b" not in text and "␛[31m" in text
    assert re.search(r"^ 0 +1 +<s>", show_file(file, *where, "-n", "1", "--positions"), re.MULTILINE)
    segment = json.loads(show_file(file, *where, "-n", "1", "--json"))[0]
    assert "".join(token["text"] for token in segment["tokens"] if token["trained_on"]) == "<script>x</script></s>"

    page = tmp_path / "page.html"
    assert "2 rows of 64 positions" in show_file(file, *where, "-n", "2", "--seq-len", "64", "--html", str(page), "--positions")
    source = page.read_text()
    assert "<script" not in source and "http://" not in source and "https://" not in source and "src=" not in source
    trained_on = re.findall(r'<span class="l[ c]*" title="[^"]*">([^<]*)', source)
    assert html.unescape("".join(trained_on)).startswith("<script>x</script></s>")


def test_what_cannot_be_shown(tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path]) -> None:
    file = str(write_lines("a.jsonl", chats(2)))
    for arguments, reason in (
        ([file], "state --tokenizer"),
        ([file, "--tokenizer", str(tmp_path / "none")], "no tokenizer at"),
        ([str(tmp_path / "none.jsonl"), "--tokenizer", str(tokenizer.path)], "no file matches"),
        ([file, "--tokenizer", str(tokenizer.path), "--seq-len", "8"], r"a\.jsonl:1: the record has \d+ tokens, seq_len is 8"),
        ([str(write_lines("b.jsonl", [{"text": ""}])), "--tokenizer", str(tokenizer.path)], "no record with any text"),
        ([str(write_lines("c.jsonl", [WITH_TOOLS])), "--tokenizer", str(tokenizer.path)], r"c\.jsonl:1: .*--chat-template"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=reason):
            show_file(*arguments)
