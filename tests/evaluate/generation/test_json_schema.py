"""Answers that fit a JSON schema, from a model of random weights; masks for each kind of tokenizer (extra `schema`)."""

from __future__ import annotations

import importlib.util
import json
import sys

import jax
import jsonschema
import numpy as np
import pytest

from moe_train.commands.train_tokenizer import train_tokenizer
from moe_train.data.tokenizers.mistral import Mistral
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.evaluate.generation.generator import Generator
from moe_train.evaluate.generation.json_schema import JsonSchema
from moe_train.evaluate.generation.sampling import Sampling
from moe_train.model.parameters import combine
from tests.data.hugging_face import TEKKEN
from tests.evaluate.tiny_generator import MIXTRAL, ONE, random_model

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "sizes": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
    "required": ["colour", "sizes"],
    "additionalProperties": False,
}
needs_llguidance = pytest.mark.skipif(importlib.util.find_spec("llguidance") is None, reason="needs the extra `schema`")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 20, 290, tmp_path_factory.mktemp("tokenizer"))


@needs_llguidance
def test_every_answer_fits_the_schema(tokenizer: Tokenizer) -> None:
    schema = JsonSchema(SCHEMA, tokenizer)
    with jax.set_mesh(ONE):
        generator = Generator(combine(*random_model(MIXTRAL)), MIXTRAL, ONE, max_rows=2)
        sampling = Sampling(100, tuple(tokenizer.end_ids), temperature=1.0)
        completions = generator.generate([[5], [6], [7]], sampling, schema=schema)
    answers = [tokenizer.decode(completion.tokens) for completion in completions]
    assert all(completion.stop == "end_token" for completion in completions), answers
    for answer in answers:
        jsonschema.validate(json.loads(answer), SCHEMA)


@needs_llguidance
@pytest.mark.parametrize("name", [TEKKEN.name, "mistral_instruct_tokenizer_240323.model.v3"])
def test_tokens_of_mistrals_own_tokenizers_are_masked_by_their_bytes(name: str) -> None:
    mistral = Mistral(TEKKEN.parent / name)
    pieces = mistral.bytes_of(range(mistral.vocab_size))
    state = JsonSchema({"const": "é 1 €"}, mistral).begin()
    tokens: list[int] = []
    while not (allowed := state.allowed(mistral.vocab_size))[mistral.eos_id]:
        tokens.append(max(map(int, np.flatnonzero(allowed)), key=lambda number: len(pieces[number])))
        state.add(tokens[-1:])
    assert json.loads(mistral.decode(tokens)) == "é 1 €"


@needs_llguidance
def test_an_answer_in_tokens_of_sentencepiece_may_begin_with_a_space() -> None:
    """As texts do that the model has learnt; what the schema forces within an answer has none."""
    mistral = Mistral(TEKKEN.parent / "mistral_instruct_tokenizer_240323.model.v3")
    pieces = mistral.bytes_of(range(mistral.vocab_size))
    state = JsonSchema(SCHEMA, mistral).begin()
    allowed = state.allowed(mistral.vocab_size)
    assert {pieces[number] for number in np.flatnonzero(allowed)} == {b" ", b"{", b" {", b'{"', b' {"'}
    tokens: list[int] = []
    while not (allowed := state.allowed(mistral.vocab_size))[mistral.eos_id]:
        tokens.append(max(map(int, np.flatnonzero(allowed)), key=lambda number: len(pieces[number])))
        state.add(tokens[-1:])
    assert tokens[0] == mistral.encode('{"')[0]
    jsonschema.validate(json.loads(mistral.decode(tokens)), SCHEMA)


@needs_llguidance
def test_a_schema_that_is_none_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"the JSON schema cannot be compiled: .*objet.*; correct it"):
        JsonSchema({"type": "objet"}, tokenizer)


def test_without_the_package_the_extra_is_named(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"install it: bash launch/install\.sh schema"):
        JsonSchema(SCHEMA, tokenizer)
