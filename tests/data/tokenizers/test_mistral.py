"""Mistral's own tokenizers, of every version, from a file or a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.data.tokenizers.mistral import Mistral
from tests.data.hugging_face import TEKKEN


def test_mistral(mistral: Mistral, tmp_path: Path) -> None:
    assert (mistral.bos_id, mistral.eos_id, mistral.vocab_size) == (1, 2, 131072)
    text = "Grüße, 東京!\n\n"
    assert mistral.decode(mistral.encode(text)) == text
    assert mistral.files == (TEKKEN,)
    (tmp_path / "tekken.json").symlink_to(TEKKEN)
    assert Mistral(tmp_path).identity == mistral.identity
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        Mistral(tmp_path / "tekken2.json")
    (tmp_path / "tekken2.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="should hold one"):
        Mistral(tmp_path)
    with pytest.raises(ValueError, match="is not a tokenizer that mistral-common reads"):
        Mistral(tmp_path / "tekken2.json")


@pytest.mark.parametrize("file", sorted(file.name for file in TEKKEN.parent.glob("*.model.v*") if "m1" not in file.name))
def test_every_sentencepiece_version(file: str) -> None:
    tokenizer = Mistral(TEKKEN.parent / file)
    assert tokenizer.vocab_size == (32000 if file.endswith("v1") else 32768)
    assert tokenizer.decode(tokenizer.encode("Grüße, 東京")) == "Grüße, 東京"


def test_a_run_of_white_space_that_is_too_long_is_an_error_with_its_length(mistral: Mistral) -> None:
    assert mistral.decode(mistral.encode(" " * 100_000 + "a")) == " " * 100_000 + "a"
    with pytest.raises(ValueError, match=r"tekken.*json cannot split the text into words: it has a run of 1100000 white-space"):
        Mistral(mistral.path, 1 << 21).encode("a" + " " * 1_100_000 + "a")
