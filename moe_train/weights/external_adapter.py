"""External adapters of any layout: PEFT's, Mistral's own, or llama.cpp's."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import ModuleType

from moe_train import config
from moe_train.model.parameters import Parameters
from moe_train.weights import gguf, peft, safetensors_files, together
from moe_train.weights.arrays import Abstract
from moe_train.weights.gguf import lora as gguf_lora
from moe_train.weights.mistral import lora as mistral_lora
from moe_train.weights.mistral import params_json


def read_external_lora(path: str | Path, model: config.Model, encoder: config.Encoder | None = None) -> config.Lora:
    """Return the section `lora` that describes the adapter at `path`.

    Args:
        path: the adapter.
        model: the architecture of its base.
        encoder: sizes of the tower of the base, which PEFT's adapters may adapt; None to refuse those.

    Raises:
        FileNotFoundError: there is no adapter.
    """
    layout = _layout_of(path)
    return peft.read_lora(path, model, encoder) if layout is peft else layout.read_lora(path, model)


def load_external_adapter(
    path: str | Path, model: config.Model, abstract: Abstract, encoder: config.Encoder | None = None
) -> Parameters:
    """Read adapters, and the weights that were trained in full, into arrays.

    Args:
        path: the adapter.
        model: the architecture of its base.
        abstract: {path: shape, dtype and sharding}, from a model with the section `read_external_lora(path, model, encoder)`.
        encoder: as in `read_external_lora`.

    Raises:
        ValueError: the files belong to another base.
    """
    layout = _layout_of(path)
    if layout is peft:
        return peft.load_adapter(path, model, abstract, encoder)
    return layout.load_adapter(path, model, abstract)


def hash_external_adapter(path: str | Path) -> dict[str, str]:
    """Return the sha256 of each tensor by name, and of the settings that decide its scale; processes share the reading."""
    layout = _layout_of(path)
    if layout is gguf_lora:
        opened = gguf_lora.open_adapter(path)
        hashes = together.hash_tensors_in_shares(opened.tensors)
        # alpha scales the tensors, so a change of it alone makes another adapter.
        alpha = repr(opened.settings.get("adapter.lora.alpha"))
        hashes["adapter.lora.alpha"] = hashlib.sha256(alpha.encode()).hexdigest()
        return hashes
    weights = peft.ADAPTER_WEIGHTS if layout is peft else mistral_lora.LORA_FILE
    settings = peft.ADAPTER_CONFIG if layout is peft else params_json.PARAMS_FILE
    hashes = together.hash_tensors_in_shares(safetensors_files.open_safetensors(Path(path) / weights))
    # PEFT's alphas, or Mistral's scaling, scale the tensors, so other settings make another adapter.
    file = Path(path) / settings
    if file.is_file():  # optional, since mistral-inference does not need it
        hashes[settings] = hashlib.sha256(file.read_bytes()).hexdigest()
    return hashes


def _layout_of(path: str | Path) -> ModuleType:
    """Return the module that reads the adapter at `path`.

    Raises:
        FileNotFoundError: there is no adapter; the message names the files that were looked for.
    """
    directory = Path(path)
    # The layout modules have the same functions, so the module itself stands for the layout.
    if (directory / peft.ADAPTER_CONFIG).is_file():
        return peft
    if (directory / mistral_lora.LORA_FILE).is_file():
        return mistral_lora
    if gguf.file_in(path) is not None:
        return gguf_lora
    raise FileNotFoundError(
        f"{path} has no adapter: looked for {peft.ADAPTER_CONFIG} (PEFT), {mistral_lora.LORA_FILE} (Mistral's own layout) and one "
        ".gguf file; name the folder of an adapter"
    )
