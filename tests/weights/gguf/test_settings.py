"""The keys of a GGUF file: what is not supported is refused, and what llama.cpp cannot express."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_train.weights import external, gguf
from moe_train.weights.gguf import container
from moe_train.weights.gguf import settings as gguf_settings
from tests.random_parameters import random_parameters
from tests.tiny import ONE
from tests.weights.gguf.models import MINISTRAL, MINISTRAL3, MISTRAL, YARN, rewrite, shapes, write

CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"general.architecture": "qwen2"}, "general.architecture is 'qwen2'"),
    "an adapter": ({"general.type": "adapter"}, "general.type is 'adapter'"),
    "a part": ({"split.count": 2}, "one of 2 parts"),
    "values of another length": ({"llama.attention.value_length": 32}, "attention.value_length is 32"),
    "half of the head turns": ({"llama.rope.dimension_count": 12}, "rope.dimension_count is 12"),
    "linear scaling": ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, "rope.scaling is linear by 4"),
    "yarn under llama": ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "cannot have a yarn rope"),
    "layers that differ": ({"llama.feed_forward_length": np.array([96, 48], np.uint32)}, "differs between layers"),
    "no layers": ({"llama.block_count": None}, "llama.block_count is missing"),
    "more layers than there are": ({"llama.block_count": 3}, "lacks blk.2.attn_norm.weight"),
    "fewer layers": ({"llama.block_count": 1}, "has blk.1.attn_norm.weight"),
    "text for a number": ({"llama.block_count": "two"}, "num_layers"),
    "negative": ({"llama.context_length": np.int32(-1)}, "max_seq_len"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_not_built_is_refused(name: str, tmp_path: Path) -> None:
    changes, said = CHANGES[name]
    with jax.set_mesh(ONE):
        parameters = random_parameters(MISTRAL)
        opened = container.open_gguf(write(tmp_path, MISTRAL, parameters))
        keys = {k: v for k, v in ({**opened.settings, **changes}).items() if k != gguf_settings.MODEL_KEY and v is not None}
        rewrite(tmp_path / "x.gguf", keys, {name: tensor.read() for name, tensor in opened.tensors.items()})
        with pytest.raises(ValueError, match=said) as error:
            external.load_external_parameters(tmp_path / "x.gguf", shapes(parameters))
    assert "\n" not in str(error.value) and "x.gguf" in str(error.value)


def test_changed_frequencies_and_changed_keys_are_refused(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        opened = container.open_gguf(write(tmp_path, MISTRAL, random_parameters(MISTRAL)))
    arrays = {"rope_freqs.weight": np.full(12, 2, np.float32), "token_embd.weight": opened.tensors["token_embd.weight"].read()}
    rewrite(tmp_path / "x.gguf", {k: v for k, v in opened.settings.items() if k != gguf_settings.MODEL_KEY}, arrays)
    with pytest.raises(ValueError, match=r"rope_freqs.weight changes the rotary frequencies"):
        gguf.read_model_config(tmp_path / "x.gguf")
    rewrite(tmp_path / "x.gguf", opened.settings | {"llama.rope.freq_base": 5e5}, {})
    with pytest.raises(ValueError, match=r"llama.rope.freq_base is 500000.0, but 1000000.0 by moe_train.model"):
        gguf.read_model_config(tmp_path / "x.gguf")


def test_a_window_becomes_the_context(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with jax.set_mesh(ONE):
        file = write(tmp_path, MINISTRAL, random_parameters(MINISTRAL))
    assert container.open_gguf(file).settings["llama.context_length"] == 48
    assert "a context of 48 tokens, up to which the model is exact" in caplog.text


def test_a_scale_that_llama_cpp_has_no_words_for_is_refused() -> None:
    model = MINISTRAL3.model_copy(update={"rope": YARN.model_copy(update={"mscale": 0.5})})
    with pytest.raises(ValueError, match=r"rope.mscale is 0.5; llama.cpp assumes 1"):
        gguf_settings.architecture_settings(model)
