"""External models: the layout of a path, and tensors that are not those of the architecture."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest

from moe_train.commands import write_and_prove as write
from moe_train.weights import external
from tests.random_parameters import abstract, random_parameters
from tests.tiny import MIXTRAL, ONE


def test_a_model_that_does_not_fit_its_config_is_refused(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        write.export_model(random_parameters(MIXTRAL), MIXTRAL, tmp_path / "out", write.WriteOptions(dtype="float32"))
        file = tmp_path / "out/config.json"
        settings = json.loads(file.read_text())
        for change, message in (
            ({"intermediate_size": 10}, "of shape"),
            ({"num_hidden_layers": 3}, "which this architecture does not have"),
        ):
            file.write_text(json.dumps(settings | change))
            with pytest.raises(ValueError, match=message):
                external.load_external_parameters(tmp_path / "out", abstract(MIXTRAL))
        file.write_text(json.dumps(settings))
        assert external.describe_choice(tmp_path / "out") is None
        (tmp_path / "out/adapter_config.json").touch()
        assert "also has a PEFT adapter, which transformers would load" in str(external.describe_choice(tmp_path / "out"))
        wider = MIXTRAL.model_copy(update={"model_dim": 16})
        with pytest.raises(ValueError, match=r"provides .*\(24, 8\)"):
            external.load_external_parameters(tmp_path / "out", abstract(wider))


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no model: looked for config\.json .*params\.json"):
        external.read_external_model(tmp_path)
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(
        FileNotFoundError, match="is an adapter, not a model; merge it into its base: moe-train adapters merge BASE"
    ):
        external.read_external_model(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"no such folder; a model is a folder with config\.json or params\.json, or a \.gguf"
    ):
        external.read_external_model(tmp_path / "missing")


@pytest.mark.parametrize(
    ("files", "layout"),
    [
        (("config.json",), "hf"),
        (("params.json",), "mistral"),
        (("config.json", "params.json"), "mistral"),  # its config.json belongs to no weights
        (("config.json", "params.json", "model.safetensors"), "hf"),
        (("a.gguf",), "gguf"),
    ],
)
def test_the_layout_of_a_folder(files: tuple[str, ...], layout: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).touch()
    assert external.layout_of(tmp_path) == layout
    assert external.layout_of("anywhere/x.gguf") == "gguf"
