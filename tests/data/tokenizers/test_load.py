"""The tokenizer of a config section, and the section that suits the files at a path."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train import config
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.load import load_tokenizer, tokenizer_at
from tests.data.hugging_face import TEKKEN, copied


def test_what_lies_at_a_path(tokenizer: HuggingFace, tmp_path: Path) -> None:
    def at(path: Path) -> tuple[str, str]:
        found = tokenizer_at(path)
        return found.name, Path(found.path).name

    directory = copied(tokenizer, tmp_path / "t")
    (directory / "tekken.json").symlink_to(TEKKEN)
    assert at(directory) == ("huggingface", "t") and at(directory / "tokenizer.json") == ("huggingface", "tokenizer.json")
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.model.v3").touch()
    assert at(directory) == ("mistral", "tekken.json")
    (directory / "tekken.json").unlink()
    assert at(directory) == ("mistral", "t") and at(directory / "tokenizer.model.v3") == ("mistral", "tokenizer.model.v3")
    (directory / "tokenizer.model.v3").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*; give a folder"):
        tokenizer_at(directory)


def test_a_section_names_the_library_that_reads_it(tokenizer: HuggingFace) -> None:
    loaded = load_tokenizer(config.HuggingFaceTokenizer(name="huggingface", path=str(tokenizer.path)))
    assert isinstance(loaded, HuggingFace) and loaded.identity == tokenizer.identity
    with pytest.raises(FileNotFoundError, match="no tokenizer at nowhere; give a tekken"):
        load_tokenizer(config.MistralTokenizer(name="mistral", path="nowhere"))
