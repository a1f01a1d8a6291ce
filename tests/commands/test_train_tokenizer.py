"""A tokenizer of one's own: whole or not there, the same each time, and transformers agrees."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.commands.train_tokenizer import train_tokenizer
from moe_train.data.chat.template import check_has_tools
from moe_train.data.tokenizers.huggingface import HuggingFace

TEXTS = ["some words to learn from, again and again"] * 20


def test_the_ids_of_the_trained_tokenizer(tokenizer: HuggingFace) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 360)
    assert tokenizer.decode([1, *tokenizer.encode("a"), 2]) == "a"
    assert tokenizer.decode([1, *tokenizer.encode("a"), 2], keep_special=True) == "<s>a</s>"
    assert [file.name for file in tokenizer.files] == ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]


def test_training_twice_gives_the_same_files(tmp_path: Path) -> None:
    first, second = (train_tokenizer(iter(TEXTS), 300, tmp_path / name) for name in ("a", "b"))
    assert first.identity == second.identity
    assert [f.read_bytes() for f in first.files] == [f.read_bytes() for f in second.files]


def test_training_refuses_what_is_there_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "tokenizer.json").write_text("mine")
    with pytest.raises(FileExistsError, match="already exists"):
        train_tokenizer(TEXTS, 300, tmp_path / "there")

    def breaks():
        yield "a"
        raise OSError("gone")

    with pytest.raises(Exception, match="gone"):
        train_tokenizer(breaks(), 300, tmp_path / "new")
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer([], 300, tmp_path / "new")
    with pytest.raises(ValueError, match="--vocab-size 200 has no room for all bytes and control tokens; use 261 or more"):
        train_tokenizer(TEXTS, 200, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there" / "tokenizer.json").read_text() == "mine"


def test_a_crash_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *args: object, **kwargs: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"No space left on device; .*new was not written"):
        train_tokenizer(TEXTS, 300, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_chatml_has_tools_and_ends_its_turns(tmp_path: Path) -> None:
    made = train_tokenizer(TEXTS, 300, tmp_path / "chatml", chat_format="chatml")
    assert made.end_tokens == ("<|im_end|>",) and made.bos_id is None and made.is_token("<|im_start|>")
    check_has_tools(str(made.chat_template), made)


@pytest.mark.judges
def test_transformers_loads_the_trained_tokenizer(tokenizer: HuggingFace) -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers' AutoTokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer.files[0].parent)
    text = "Grüße from json.dumps: 東京 3.14\n  x"
    assert theirs(text)["input_ids"] == [tokenizer.bos_id, *tokenizer.encode(text)]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
    assert theirs.chat_template == tokenizer.chat_template
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.decode(tokenizer.encode(text)) == text
