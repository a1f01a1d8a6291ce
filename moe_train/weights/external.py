"""Other people's models, whatever their layout: from disk into sharded arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from moe_train import config
from moe_train.model.quantize import unquantized
from moe_train.weights import gguf, hf, mistral, names, safetensors_files, together
from moe_train.weights.arrays import Abstract, InFiles, Parameters, fill, leave
from moe_train.weights.hf import config_json
from moe_train.weights.mistral import params_json
from moe_train.weights.on_disk import Weights


def layout_of(path: str | Path) -> Literal["hf", "mistral", "gguf"]:
    """What lies at `path`; where a folder holds a model in both layouts, as Mistral's releases do, Hugging Face's.

    Raises FileNotFoundError where there is no model, saying what was looked for.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return "gguf"
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: no such folder; a model is a folder with {config_json.FILE} or {params_json.FILE}, or a .gguf file"
        )
    described = {"hf": path / config_json.FILE, "mistral": path / params_json.FILE}
    if described["hf"].is_file() and (safetensors_files.has_model(path) or not described["mistral"].is_file()):
        return "hf"
    if described["mistral"].is_file():
        return "mistral"
    if gguf.file_in(path) is not None:
        return "gguf"
    if (path / "adapter_config.json").is_file():  # PEFT's
        raise FileNotFoundError(f"{path} is an adapter, not a model; add it to its base: moe-train adapters merge BASE {path} OUT")
    raise FileNotFoundError(
        f"{path} holds no model: looked for {config_json.FILE} (Hugging Face), {params_json.FILE} (Mistral's own layout) and "
        "one .gguf file"
    )


def open_weights(path: str | Path) -> Weights:
    """The model at `path`, in whatever layout.

    Raises FileNotFoundError where there is none, ValueError where it is damaged or of an architecture not built here.
    """
    match layout_of(path):
        case "hf":
            return hf.open_weights(path)
        case "mistral":
            return mistral.open_weights(path)
        case "gguf":
            return gguf.open_weights(path)


def read_model(path: str | Path) -> config.Model:
    """The architecture of the model at `path`."""
    match layout_of(path):
        case "hf":
            return hf.read_model_config(path)
        case "mistral":
            return mistral.read_model_config(path)
        case "gguf":
            return gguf.read_model(path)


def load_parameters(path: str | Path, abstract: Abstract) -> Parameters:
    """The weights of a model as arrays of the shapes, dtypes and shardings of `abstract` ({path: …}).

    `abstract` may name some of the weights; adapters are in no such model. The host holds one device's part of one
    array at a time. Raises ValueError unless the tensors are those of the architecture and fill every array.
    """
    found = _checked(path, abstract)
    return fill(abstract, found.table, found.tensors)


def leave_parameters(path: str | Path, abstract: Abstract) -> dict[str, InFiles]:
    """The same, left in the files until they are asked for. Raises as `load_parameters`."""
    found = _checked(path, abstract)
    return leave(abstract, found.table, found.tensors)


def _checked(path: str | Path, abstract: Abstract) -> Weights:
    found = open_weights(path)
    shapes = {name: tensor.shape for name, tensor in found.tensors.items()}
    names.check(path, found.table, shapes, {path: like.shape for path, like in unquantized(abstract).items()})
    return found


def hashes(path: str | Path) -> dict[str, str]:
    """sha256 of each tensor that `load_parameters` reads, by its name in the files; several processes read a share each."""
    return together.tensor_hashes(open_weights(path).tensors)
