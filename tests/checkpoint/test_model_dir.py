"""Opening a model from a directory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.checkpoint import model_dir
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.weights import external
from moe_train.weights.on_disk import WeightFiles
from tests.random_parameters import random_parameters
from tests.tiny import ONE
from tests.weights.gguf.models import MISTRAL, write


def test_a_folder_with_one_file_is_a_model(tmp_path: Path, text: Path) -> None:
    tokenizer = HuggingFace(text / "tokenizer")
    with jax.set_mesh(ONE):
        file = write(tmp_path, MISTRAL, random_parameters(MISTRAL), tokenizer=tokenizer)
    opened = model_dir.open_model(tmp_path)
    assert opened.model == MISTRAL and opened.chat_template == tokenizer.chat_template
    assert opened.tokenizer.encode("What, ünder?") == tokenizer.encode("What, ünder?")
    assert model_dir.find_tokenizer_config(file) == model_dir.find_tokenizer_config(tmp_path)
    (tmp_path / "second.gguf").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"one \.gguf file"):
        model_dir.open_model(tmp_path)


def test_a_model_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"has no tokenizer\.json, tekken\.json or tokenizer\.model; copy the model's own there"
    ):
        model_dir.find_tokenizer_config(tmp_path)


def test_a_model_lies_along_fsdp_on_the_devices_that_are_here() -> None:
    assert model_dir.mesh_for_devices(None, MISTRAL) == config.Mesh(fsdp=8)
    with pytest.raises(ValueError, match="model_dim 12 is not divisible by the 8 available devices; make fewer of them visible"):
        model_dir.mesh_for_devices(None, MISTRAL.model_copy(update={"model_dim": 12}))


@pytest.mark.parametrize(("dtypes", "dtype"), [(("float32",), "float32"), (("float32", "float16"), "bfloat16")])
def test_the_dtype_of_files_that_have_one(
    dtypes: tuple[str, ...], dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tensors = {name: SimpleNamespace(dtype=np.dtype(name)) for name in dtypes}
    monkeypatch.setattr(external, "open_external_weights", lambda directory: WeightFiles(directory, MISTRAL, [], tensors))
    assert model_dir.dtype_of_files(tmp_path, "bfloat16") == dtype
