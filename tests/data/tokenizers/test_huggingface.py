"""Tokenizers of Hugging Face: text survives the round trip, settings saved in the files do no harm, damaged files are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.hugging_face import copied


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_round_trip(tokenizer: HuggingFace, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), keep_special=True) == text
    assert tokenizer.encode_batch([text, text]) == [tokenizer.encode(text)] * 2


def test_padding_truncation_and_trimmed_offsets_saved_in_the_file_have_no_effect(tokenizer: HuggingFace, tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    trimming = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    directory = copied(tokenizer, tmp_path / "t", truncation=truncation, padding=padding, post_processor=trimming)
    changed = HuggingFace(directory)
    text = "a text of more than four tokens   </s>  "
    assert changed.encode(text) == tokenizer.encode(text)
    characters = [(i, i + 1) for i in range(len(text))]
    assert changed.encode_marked([changed.marked([text], characters)]) == tokenizer.encode_marked(
        [tokenizer.marked([text], characters)]
    )
    assert changed.identity != tokenizer.identity


def test_tokens_that_end_a_generation(tokenizer: HuggingFace, tmp_path: Path) -> None:
    directory = copied(tokenizer, tmp_path / "t")
    before = HuggingFace(directory)
    assert before.end_tokens == ("</s>",) and before.end_ids == (2,)
    (directory / "generation_config.json").write_text('{"eos_token_id": [4, 2, 99999]}')
    assert HuggingFace(directory).end_ids == (2, 4) and HuggingFace(directory).identity == before.identity
    (directory / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert HuggingFace(directory).end_tokens == ("</s>", "[INST]")
    assert tokenizer.is_token("[INST]") and not tokenizer.is_token("<|im_end|>")


def test_files_that_cannot_be_used(tokenizer: HuggingFace, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        HuggingFace(tmp_path / "nothing")
    directory = copied(tokenizer, tmp_path / "t")
    (directory / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    with pytest.raises(ValueError, match="names no eos_token"):
        HuggingFace(directory)
    (directory / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
    with pytest.raises(ValueError, match=r"eos_token '<end>' .* is not in"):
        HuggingFace(directory)
    (directory / "tokenizer_config.json").write_text('{"eos_token": {"id": 2}}')
    with pytest.raises(ValueError, match="names no eos_token"):
        HuggingFace(directory)
    for text, reason in (("{", "is not JSON"), ("[1]", "is not a JSON object")):
        (directory / "tokenizer_config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"tokenizer_config\.json {reason}"):
            HuggingFace(directory)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        HuggingFace(directory)
