"""The date of chat templates: fixed for a cache, so that a record has the same ids each day, and absent from exports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_train import config
from moe_train.data.batches.batch import BatchRows
from moe_train.data.batches.loader import Loader
from moe_train.data.chat import chat_date
from moe_train.data.chat.chat_date import date_of, dated, keep_date, kept_date, undated
from moe_train.data.chat.sandbox import render
from moe_train.data.prepared.store import TokenStore
from moe_train.data.tokenizers.huggingface import HuggingFace

READS_DATE = (
    "{{ bos_token }}{{ strftime_now('%d %m %Y') }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST]' + m.content + '[/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
CHATS = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3


def on(monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    monkeypatch.setattr(chat_date, "today", lambda: day)


def data(file: Path, cache: Path) -> config.Data:
    source = config.FileSource(name="files", files=(str(file),), record=config.ChatRecord(name="chat"))
    return config.Data(chat_template=READS_DATE, train=(source,), cache_dir=str(cache))


def first_text(chosen: config.Data, tokenizer: HuggingFace) -> str:
    loader = Loader(chosen, "train", tokenizer, BatchRows(1, 64), seed=0)
    return tokenizer.decode(loader.batch(0).tokens[0].tolist()[:20])


def test_a_template_as_of_a_date() -> None:
    template = "\n  a{{ strftime_now('%Y') }}"
    assert render(dated(template, "2024-05-06"), [{}]) == ["\n  a2024"]
    assert undated(dated(template, "2024-05-06")) == template and date_of(dated(template, "2024-05-06")) == "2024-05-06"
    assert dated(dated(template, "2024-05-06"), "2025-01-01") == dated(template, "2025-01-01")
    assert dated("{{ a }}", "2024-05-06") == "{{ a }}" and date_of("{{ a }}") is None and date_of(None) is None


def test_a_cache_keeps_the_date_of_its_first_preparation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "2026-03-04")
    assert kept_date(tmp_path / "new") == "2026-03-04" and not (tmp_path / "new").exists()
    assert keep_date(tmp_path / "new") == "2026-03-04"
    on(monkeypatch, "2026-03-05")
    assert keep_date(tmp_path / "new") == kept_date(tmp_path / "new") == "2026-03-04"
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["chat_date"]
    (tmp_path / "new" / "chat_date").write_text("yesterday")
    with pytest.raises(ValueError, match=r"should hold a date such as 2026-11-30, not 'yesterday'; set data\.chat_date"):
        keep_date(tmp_path / "new")


def test_the_ids_are_the_same_tomorrow(
    tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = data(write_lines("a.jsonl", CHATS), tmp_path / "cache")
    on(monkeypatch, "2026-03-04")
    first = first_text(chosen, tokenizer)
    assert "04 03 2026" in first
    on(monkeypatch, "2026-03-05")
    assert first_text(chosen, tokenizer) == first
    (prepared,) = (tmp_path / "cache").glob("tokens-*/manifest.json")
    assert TokenStore(prepared.parent).manifest.rules.chat_date == "2026-03-04"
    stated = chosen.model_copy(update={"chat_date": "2025-12-31"})
    assert "31 12 2025" in first_text(stated, tokenizer)
    # A prepared set is trained on with its own date.
    source = config.PreparedSource(name="prepared", path=str(prepared.parent))
    moved = chosen.model_copy(update={"train": (source,), "cache_dir": str(tmp_path / "other")})
    assert first_text(moved, tokenizer) == first
    with pytest.raises(ValueError, match=r"was prepared with chat_date 2026-03-04, not 2025-12-31; leave data\.chat_date out"):
        first_text(moved.model_copy(update={"chat_date": "2025-12-31"}), tokenizer)


def test_the_date_of_a_config() -> None:
    source = '"train": [{"name": "files", "files": ["a"], "record": {"name": "text"}}]'
    assert config.Data.model_validate_json(f'{{{source}, "chat_date": "2026-11-30"}}').chat_date == "2026-11-30"
    with pytest.raises(ValueError, match="'2026-02-30' is no date; write it as 2026-11-30"):
        config.Data.model_validate_json(f'{{{source}, "chat_date": "2026-02-30"}}')
