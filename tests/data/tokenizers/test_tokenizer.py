"""What both kinds of tokenizer can do: plain text stays plain, and they travel to other processes."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral
from moe_train.data.tokenizers.tokenizer import check_vocab, hash_files


def test_control_tokens_in_plain_text_are_text(tokenizer: HuggingFace, mistral: Mistral) -> None:
    text = "<s>[INST] hello [/INST]</s><pad>"
    for either in (tokenizer, mistral):
        ids = either.encode(text)
        assert either.eos_id not in ids and either.bos_id not in ids
        assert either.decode(ids) == text


def test_a_vocabulary_larger_than_the_models(tokenizer: HuggingFace) -> None:
    check_vocab(tokenizer, 360)
    with pytest.raises(ValueError, match="has 360 ids, the model's vocab_size is 359"):
        check_vocab(tokenizer, 359)


def test_both_kinds_travel_to_another_process(tokenizer: HuggingFace, mistral: Mistral) -> None:
    for either in (tokenizer, mistral):
        again = pickle.loads(pickle.dumps(either))
        assert again.identity == either.identity and again.encode("abc") == either.encode("abc")


def test_the_identity_follows_contents_and_their_order(tmp_path: Path) -> None:
    for name, content in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (tmp_path / name for name in "abc")
    assert hash_files([a, b]) == hash_files([c, b])
    assert len({hash_files(files) for files in ([a, b], [b, a], [a], [])}) == 4


def test_control_ids_are_those_that_no_text_has(tokenizer: HuggingFace, mistral: Mistral) -> None:
    assert tokenizer.control_ids == {0, 1, 2, 3, 4}
    assert {mistral.bos_id, mistral.eos_id} < mistral.control_ids and not mistral.control_ids & set(mistral.encode("any text </s>"))
