"""The Modelfile beside a GGUF file."""

from __future__ import annotations

from pathlib import Path

import jax

from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.weights.gguf.ollama import modelfile
from tests.random_parameters import random_parameters
from tests.tiny import ONE
from tests.weights.gguf.models import MISTRAL, write


def test_the_modelfile(tmp_path: Path, tokenizer: HuggingFace) -> None:
    with jax.set_mesh(ONE):
        parameters = random_parameters(MISTRAL)
        write(tmp_path, MISTRAL, parameters, tokenizer=tokenizer)
        modelfile = (tmp_path / "Modelfile").read_text()
        assert modelfile.startswith('FROM ./model.gguf\nTEMPLATE """{{ $first := true }}{{ range $i, $_ := .Messages }}')
        assert modelfile.endswith('PARAMETER stop "</s>"\nPARAMETER stop "[INST]"\n')
        write(tmp_path, MISTRAL, parameters)
        assert "TEMPLATE" not in (tmp_path / "Modelfile").read_text()


def test_a_chat_of_no_known_format_is_left_to_ollama() -> None:
    text = modelfile("model.gguf", None)
    assert text.startswith("FROM ./model.gguf\n# The file has a chat template in Jinja") and "PARAMETER" not in text
