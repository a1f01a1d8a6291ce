"""An adapter that is merged into another model than its base is noticed: by hashes, or by names."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from moe_train.commands.base_of_adapter import summary_of_hashes, warn_of_another_base
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.weights import external
from tests.commands.wrapper import TEXT, save_run_on_wrapper, save_wrapper
from tests.random_parameters import random_parameters
from tests.tiny import ONE


def warnings(caplog: pytest.LogCaptureFixture, base: Path, adapter: Path) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn_of_another_base(base, adapter)
    return caplog.text


def test_hashes_decide_where_they_are_known(small_tokenizer: HuggingFace, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_run_on_wrapper(tmp_path, small_tokenizer)
    with jax.set_mesh(ONE):
        save_wrapper(tmp_path / "copy", random_parameters(TEXT))
        save_wrapper(tmp_path / "other", random_parameters(TEXT))
    tensors = safetensors.numpy.load_file(tmp_path / "base/model.safetensors")
    safetensors.numpy.save_file(tensors, tmp_path / "copy/model.safetensors")
    changed = tensors | {"language_model.model.norm.weight": np.zeros_like(tensors["language_model.model.norm.weight"])}
    safetensors.numpy.save_file(changed, tmp_path / "other/model.safetensors")
    export = tmp_path / "export"
    export.mkdir()
    sha256 = summary_of_hashes(external.hash_external_model(tmp_path / "base"))
    (export / "export_proof.json").write_text(json.dumps({"base": {"source": "x", "step": None, "sha256": sha256}}))
    for adapter in (tmp_path / "run", export):
        assert not warnings(caplog, tmp_path / "base", adapter)
        assert not warnings(caplog, tmp_path / "copy", adapter)
        assert "has other weights than" in warnings(caplog, tmp_path / "other", adapter)


@pytest.mark.parametrize(
    ("named", "is_said"),
    [("org/model", False), ("/elsewhere/model", False), ("org/another", True), (None, False)],
)
def test_names_are_compared_where_no_hash_is_known(
    named: str | None, is_said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": named}))
    text = warnings(caplog, tmp_path / "model", tmp_path)
    assert ("names org/another as its base" in text) == is_said and bool(text) == is_said
    assert not warnings(caplog, tmp_path / "model", tmp_path / "model")
