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
    write_texts(tmp_path, Texts(tokenizer, "{{ x }} ü", "name: run\n", {"README.md": "# ü\n"}))
    assert names_in(tmp_path) == {file.name for file in tokenizer.files} | {"chat_template.jinja", "moe_train.yaml", "README.md"}
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "# ü\n"
    assert (tmp_path / "tokenizer.json").read_bytes() == tokenizer.files[0].read_bytes()
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == "{{ x }} ü"
    assert (tmp_path / "moe_train.yaml").read_text() == "name: run\n"


def test_templates_with_names_are_kept_or_replaced_by_one(tokenizer: HuggingFace, tmp_path: Path) -> None:
    (tmp_path / "model" / "additional_chat_templates").mkdir(parents=True)
    for file in tokenizer.files:
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    named = HuggingFace(tmp_path / "model")
    for name, template in (("kept", None), ("replaced", named.chat_template)):
        (tmp_path / name).mkdir()
        write_texts(tmp_path / name, Texts(named, template))
        assert HuggingFace(tmp_path / name).chat_template == named.chat_template
        assert (tmp_path / name / "additional_chat_templates").exists() == (name == "kept")


def test_a_tekken_gets_the_name_that_servers_look_for(tmp_path: Path) -> None:
    write_texts(tmp_path, Texts(Mistral(DATA / "tekken_240911.json")))
    assert names_in(tmp_path) == {"tekken.json"}


def test_without_texts_nothing_is_written(tmp_path: Path) -> None:
    write_texts(tmp_path, NO_TEXTS)
    assert not list(tmp_path.iterdir())
