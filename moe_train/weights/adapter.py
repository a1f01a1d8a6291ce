"""Adapters in other people's files, whatever their layout: PEFT's, or Mistral's own."""

from __future__ import annotations

import hashlib
from pathlib import Path

from moe_train import config
from moe_train.weights import mistral_lora, on_disk, peft, safetensors_io
from moe_train.weights.arrays import Abstract, Parameters


def read_lora(path: str | Path, model: config.Model) -> config.Lora:
    """The section `lora` that the adapter in a folder amounts to. Raises FileNotFoundError where there is none."""
    return (peft if _is_peft(path) else mistral_lora).read_lora(path, model)


def load_adapter(path: str | Path, model: config.Model, abstract: Abstract) -> Parameters:
    """The adapters, and what was trained in full beside them, as arrays like `abstract` ({path: …}), which comes from a
    model with the section `read_lora(path, model)`. Raises ValueError where the files are another base's."""
    return (peft if _is_peft(path) else mistral_lora).load_adapter(path, model, abstract)


def hashes(path: str | Path) -> dict[str, str]:
    """sha256 of each tensor by its name, and of the settings."""
    directory, is_peft = Path(path), _is_peft(path)
    found = on_disk.hashes(safetensors_io.open_file(directory / (peft.WEIGHTS if is_peft else mistral_lora.FILE)))
    settings = directory / (peft.CONFIG if is_peft else "params.json")
    return found | ({settings.name: hashlib.sha256(settings.read_bytes()).hexdigest()} if settings.is_file() else {})


def _is_peft(path: str | Path) -> bool:
    directory = Path(path)
    if (directory / peft.CONFIG).is_file():
        return True
    if (directory / mistral_lora.FILE).is_file():
        return False
    raise FileNotFoundError(f"{path} holds no adapter: looked for {peft.CONFIG} (PEFT) and {mistral_lora.FILE} (Mistral's own)")
