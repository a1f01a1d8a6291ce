"""A run refuses a tokenizer that is not its model's, and a template that its export would not carry."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_train import config
from moe_train.commands.train_tokenizer import train_tokenizer
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.run.preflight import check_ready
from moe_train.weights import texts
from tests.run.tiny_config import MODEL, written

TEXTS = ["The quick brown fox jumps over the lazy dog.", "What is 2 + 3? It is 5."] * 8
CHATS = [[{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}] for i in range(3)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HuggingFace:
    return train_tokenizer(TEXTS, 300, tmp_path_factory.mktemp("tokenizer") / "bpe")


@pytest.fixture
def run(tokenizer: HuggingFace, tmp_path: Path) -> Callable[..., config.Config]:
    """A config with conversations, a model of `vocab_size` and settings of its data."""
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in CHATS))

    def run(path: Path | None = None, vocab_size: int = 300, init_from: Path | None = None, **data: Any) -> config.Run:
        source = config.FileSource(name="files", files=(str(file),), record=config.ChatRecord(name="chat"))
        section = config.HuggingFaceTokenizer(name="huggingface", path=str(path or tokenizer.path))
        sections = config.Data(train=(source,), tokenizer=section, **data).model_dump(mode="json")
        made = written(model={**MODEL, "vocab_size": vocab_size}, data=sections, init_from=init_from and str(init_from))
        return config.run_of(made)

    return run


def check(run: config.Run, tokenizer: HuggingFace) -> None:
    check_ready(run, run.training_data(), tokenizer)


def test_what_is_in_order(run: Any, tokenizer: HuggingFace, tmp_path: Path) -> None:
    check(run(), tokenizer)
    check(run(init_from=tokenizer.path), tokenizer)
    check(run(init_from=tmp_path), tokenizer)  # weights without a tokenizer


def test_a_tokenizer_of_another_size(run: Any, tokenizer: HuggingFace) -> None:
    with pytest.raises(ValueError, match="has 300 ids, the model's vocab_size is 299"):
        check(run(vocab_size=299), tokenizer)


def test_a_tokenizer_that_is_not_the_models(run: Any, tokenizer: HuggingFace, tmp_path: Path) -> None:
    other = train_tokenizer(["zürich übermütig größe " * 4, "ganz anderer text hier"] * 8, 300, tmp_path / "other")
    content = json.loads((other.path / "tokenizer.json").read_text())
    content["model"]["vocab"] = {
        piece: (i - 5 + 7) % 256 + 5 if 5 <= i < 261 else i for piece, i in content["model"]["vocab"].items()
    }
    (other.path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"is not that of .*other: id \d+ is .* instead of .*; leave data.tokenizer out"):
        check(run(init_from=other.path), tokenizer)


def test_an_export_that_nothing_would_read(run: Any, tokenizer: HuggingFace, tmp_path: Path) -> None:
    shutil.copytree(tokenizer.path, tmp_path / "t")
    (tmp_path / "t" / "tokenizer.json").rename(tmp_path / "t" / "mine.json")
    with pytest.raises(ValueError, match=r"an export would contain mine\.json, .*directory with tokenizer\.json"):
        check(run(tmp_path / "t" / "mine.json"), HuggingFace(tmp_path / "t" / "mine.json"))


def test_a_template_that_the_export_would_not_carry(run: Any, tokenizer: HuggingFace, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_train.run import preflight

    original = texts.write_texts

    def forgets(directory: Path, texts: texts.Texts) -> None:
        original(directory, texts._replace(chat_template=None))

    template = "{% for m in messages %}{{ '[INST]' + m.role + ' ' + m.content + eos_token }}{% endfor %}"
    check(run(chat_template=template), tokenizer)
    monkeypatch.setattr(preflight, "write_texts", forgets)
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the exported chat template would render this record to other tokens"):
        check(run(chat_template=template), tokenizer)


def test_a_record_that_cannot_be_rendered_is_named(run: Any, tokenizer: HuggingFace) -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the chat template refuses the record: no"):
        check(run(chat_template="{{ raise_exception('no') }}"), tokenizer)
