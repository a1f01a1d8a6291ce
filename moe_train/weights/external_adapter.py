"""Adapters in other people's files, whatever their layout: PEFT's, Mistral's own, or llama.cpp's."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import ModuleType

from moe_train import config
from moe_train.weights import gguf, peft, safetensors_files, together
from moe_train.weights.arrays import Abstract, Parameters
from moe_train.weights.gguf import lora as gguf_lora
from moe_train.weights.mistral import lora as mistral_lora


def read_lora(path: str | Path, model: config.Model) -> config.Lora:
    """The section `lora` that the adapter at a path amounts to. Raises FileNotFoundError where there is none."""
    return _layout_of(path).read_lora(path, model)


def load_adapter(path: str | Path, model: config.Model, abstract: Abstract) -> Parameters:
    """The adapters, and what was trained in full beside them, as arrays like `abstract` ({path: …}), which comes from a
    model with the section `read_lora(path, model)`. Raises ValueError where the files are another base's."""
    return _layout_of(path).load_adapter(path, model, abstract)


def hashes(path: str | Path) -> dict[str, str]:
    """sha256 of each tensor by its name, and of the settings; several processes read a share each of the tensors."""
    directory, layout = Path(path), _layout_of(path)
    if layout is gguf_lora:
        opened = gguf_lora.open_adapter(path)
        alpha = repr(opened.settings.get("adapter.lora.alpha"))
        return together.tensor_hashes(opened.tensors) | {"adapter.lora.alpha": hashlib.sha256(alpha.encode()).hexdigest()}
    found = together.tensor_hashes(safetensors_files.open_file(directory / (peft.WEIGHTS if layout is peft else mistral_lora.FILE)))
    settings = directory / (peft.CONFIG if layout is peft else "params.json")
    return found | ({settings.name: hashlib.sha256(settings.read_bytes()).hexdigest()} if settings.is_file() else {})


def _layout_of(path: str | Path) -> ModuleType:
    directory = Path(path)
    if (directory / peft.CONFIG).is_file():
        return peft
    if (directory / mistral_lora.FILE).is_file():
        return mistral_lora
    if gguf.file_in(path) is not None:
        return gguf_lora
    raise FileNotFoundError(
        f"{path} holds no adapter: looked for {peft.CONFIG} (PEFT), {mistral_lora.FILE} (Mistral's own) and one .gguf file"
    )
