"""Tokenizers in GGUF files: the same tokens after reading them back, and tokenizers that llama.cpp does not have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral
from moe_train.weights.gguf import tokenizer as gguf_tokenizer
from tests.data.hugging_face import DATA

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="module")
def there_and_back(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], HuggingFace]:
    def convert(tokenizer: Any) -> HuggingFace:
        found = gguf_tokenizer.tokenizer_settings(tokenizer, tokenizer.vocab_size + 3, tokenizer.chat_template)
        directory = tmp_path_factory.mktemp("there")
        gguf_tokenizer.extract_tokenizer(gguf_tokenizer.tokenizer_keys(found), directory, "file.gguf")
        back = HuggingFace(directory)
        assert (back.bos_id, back.eos_id, back.chat_template) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.chat_template)
        again = gguf_tokenizer.tokenizer_settings(back, tokenizer.vocab_size + 3, back.chat_template)
        for key, value in found.items():  # and what was read writes the same file
            if not (key.endswith("scores") or key.endswith("merges")):
                assert np.array_equal(again[key], value), key
        return back

    return convert


@pytest.mark.parametrize("which", ["bpe", "tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3", "tekken_240911.json"])
def test_a_tokenizer_comes_back_out_of_the_file(which: str, tokenizer: HuggingFace, there_and_back: Any) -> None:
    ours = tokenizer if which == "bpe" else Mistral(DATA / which)
    back = there_and_back(ours)

    @given(text)
    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def same(text: str) -> None:
        assert back.encode(text) == ours.encode(text)

    same()
    assert back.decode(ours.encode("Olá,  wörld 123\n\tok")).strip() == "Olá,  wörld 123\n\tok"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["model"].update(ignore_merges=True), "has ignore_merges True, but llama.cpp's gpt-2 has the opposite"),
        (lambda d: d.update(normalizer={"type": "NFC"}), r"normalizes text \(NFC\)"),
        (lambda d: d["pre_tokenizer"].update(add_prefix_space=True), "neither a byte-level nor a sentencepiece tokenizer"),
        (lambda d: d["pre_tokenizer"].update(use_regex=False), "splits text in a way that has no name in llama.cpp"),
        (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "neither a byte-level nor a sentencepiece"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused(change: Any, said: str, tokenizer: HuggingFace, tmp_path: Path) -> None:
    described = json.loads(tokenizer.files[0].read_text())
    change(described)
    for file in tokenizer.files[1:]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=said):
        gguf_tokenizer.tokenizer_settings(HuggingFace(tmp_path), 400, None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokenizer.ggml.model": "bert"}, "a tokenizer of kind 'bert'"),
        ({"tokenizer.ggml.pre": "falcon"}, "splitting text is 'falcon', which is not supported"),
        ({"tokenizer.ggml.eos_token_id": 10_000}, "a eos_token 10000"),
        ({"tokenizer.ggml.eos_token_id": None}, "states no end-of-sequence token"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "but 2 token types"),
        ({"tokenizer.ggml.merges": ["abc"]}, "'abc' is not a merge of two tokens"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer of kind 'gpt2'"),
    ],
)
def test_a_tokenizer_in_a_file_that_is_not_read(change: Any, said: str, tokenizer: HuggingFace, tmp_path: Path) -> None:
    found = {**gguf_tokenizer.tokenizer_settings(tokenizer, 352, None), **change}
    with pytest.raises(ValueError, match=f"{said}.*name a(?: tokenizer|) in data.tokenizer|{said}"):
        gguf_tokenizer.extract_tokenizer({k: v for k, v in found.items() if v is not None}, tmp_path, "file.gguf")
