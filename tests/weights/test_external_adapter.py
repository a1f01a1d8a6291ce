"""The layout of an adapter is recognized by its files, and its identity is all that decides its deltas."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest

from moe_train.weights import external_adapter, peft
from moe_train.weights.gguf import lora as gguf_lora
from moe_train.weights.mistral import lora as mistral_lora
from tests.random_parameters import random_parameters
from tests.tiny import LORA, MIXTRAL, ONE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One adapter in each layout."""
    folder = tmp_path_factory.mktemp("adapters")
    with jax.set_mesh(ONE):
        weights = random_parameters(MIXTRAL, lora=LORA)
        peft.export_adapter(weights, MIXTRAL, LORA, folder / "peft", base_model="base")
        mistral_lora.export_adapter(weights, MIXTRAL, LORA, folder / "mistral", dtype="float32")
        gguf_lora.export_adapter(weights, MIXTRAL, LORA, folder / "gguf", base_model="base")
    return folder


@pytest.mark.parametrize("layout", ["peft", "mistral", "gguf"])
def test_any_layout_is_read(layout: str, folder: Path) -> None:
    found = external_adapter.read_external_lora(folder / layout, MIXTRAL)
    assert {module for target in found.targets for module in target.modules} == {
        *("attention.q_proj", "attention.o_proj", "ffn.gate_proj", "ffn.up_proj", "ffn.down_proj")
    }


@pytest.mark.parametrize(
    ("layout", "settings", "key"), [("peft", peft.ADAPTER_CONFIG, "lora_alpha"), ("mistral", "params.json", "lora")]
)
def test_another_scale_is_another_adapter(layout: str, settings: str, key: str, folder: Path) -> None:
    before = external_adapter.hash_external_adapter(folder / layout)
    file = folder / layout / settings
    written = file.read_text()
    file.write_text(json.dumps(json.loads(written) | {key: 99}))
    after = external_adapter.hash_external_adapter(folder / layout)
    file.write_text(written)
    assert {name for name in before if before[name] != after[name]} == {settings}
    assert len(before) > 1


def test_the_alpha_of_a_gguf_adapter_is_part_of_its_identity(folder: Path) -> None:
    assert "adapter.lora.alpha" in external_adapter.hash_external_adapter(folder / "gguf")


def test_a_path_without_adapter_names_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no adapter: looked for adapter_config\.json \(PEFT\), lora\.safetensors .*"):
        external_adapter.read_external_lora(tmp_path, MIXTRAL)
