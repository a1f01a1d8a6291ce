"""Files of an export besides its weights."""

from __future__ import annotations

from pathlib import Path

from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral
from moe_train.weights.texts import NO_TEXTS, Texts, write_texts
from tests.data.hugging_face import DATA


def names_in(directory: Path) -> set[str]:
    return {file.name for file in directory.iterdir()}


def test_files_of_the_tokenizer_are_copied_and_its_template_replaced(tokenizer: HuggingFace, tmp_path: Path) -> None:
    write_texts(tmp_path, Texts(tokenizer, "{{ x }} ü", "name: run\n"))
    assert names_in(tmp_path) == {file.name for file in tokenizer.files} | {"chat_template.jinja", "moe_train.yaml"}
    assert (tmp_path / "tokenizer.json").read_bytes() == tokenizer.files[0].read_bytes()
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == "{{ x }} ü"
    assert (tmp_path / "moe_train.yaml").read_text() == "name: run\n"


def test_a_tekken_gets_the_name_that_servers_look_for(tmp_path: Path) -> None:
    write_texts(tmp_path, Texts(Mistral(DATA / "tekken_240911.json")))
    assert names_in(tmp_path) == {"tekken.json"}


def test_without_texts_nothing_is_written(tmp_path: Path) -> None:
    write_texts(tmp_path, NO_TEXTS)
    assert not list(tmp_path.iterdir())
