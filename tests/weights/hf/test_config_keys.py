"""Keys of config.json: the text model's fields are found, and unknown keys are shown in full or shortened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_train.weights.hf.config_keys import is_wrapper, text_fields

TEXT = {"model_type": "mistral", "hidden_size": 8}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"architectures": ["Mistral3ForConditionalGeneration"]}, True),
        ({"architectures": None, "model_type": "mistral3"}, True),
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral3"}, False),
        ({"model_type": "mistral"}, False),
    ],
)
def test_a_wrapper_is_recognized(fields: dict[str, Any], expected: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert is_wrapper(tmp_path) == expected


def test_the_text_model_of_a_wrapper_takes_what_the_wrapper_states() -> None:
    wrapper = {"model_type": "mistral3", "text_config": TEXT | {"tie_word_embeddings": True}, "tie_word_embeddings": False}
    assert text_fields(wrapper) == ("mistral", TEXT | {"tie_word_embeddings": False})
    assert text_fields(TEXT) == ("mistral", TEXT)


def test_a_long_value_is_shortened() -> None:
    with pytest.raises(ValueError, match=r"^invented is '1{59}…, which is not understood"):
        text_fields(TEXT | {"invented": "1" * 100})
