"""External models of any layout: from disk into sharded arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from moe_train import config
from moe_train.model.quantize import unquantized_shapes
from moe_train.weights import gguf, hf, mistral, names, peft, safetensors_files, together
from moe_train.weights.arrays import Abstract, InFiles, Parameters, fill, leave
from moe_train.weights.hf import config_json
from moe_train.weights.mistral import params_json
from moe_train.weights.on_disk import Weights


def layout_of(path: str | Path) -> Literal["hf", "mistral", "gguf"]:
    """Detect the layout of the model at `path`; Hugging Face's if a folder has both, as Mistral's releases do.

    Raises:
        FileNotFoundError: there is no model; the message names the files that were looked for.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return "gguf"
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: no such folder; a model is a folder with {config_json.FILE} or {params_json.FILE}, or a .gguf file"
        )
    has_config = (path / config_json.FILE).is_file()
    has_params = (path / params_json.FILE).is_file()
    # config.json alone does not decide: the weights may be there only in Mistral's layout.
    if has_config and (safetensors_files.has_model(path) or not has_params):
        return "hf"
    if has_params:
        return "mistral"
    if gguf.file_in(path) is not None:
        return "gguf"
    if (path / peft.CONFIG).is_file():
        raise FileNotFoundError(f"{path} is an adapter, not a model; add it to its base: moe-train adapters merge BASE {path} OUT")
    raise FileNotFoundError(
        f"{path} holds no model: looked for {config_json.FILE} (Hugging Face), {params_json.FILE} (Mistral's own layout) and "
        "one .gguf file"
    )


def open_weights(path: str | Path) -> Weights:
    """Open the tensors of the model at `path` without reading them.

    Raises:
        FileNotFoundError: there is no model.
        ValueError: the model is damaged or its architecture is not supported.
    """
    match layout_of(path):
        case "hf":
            return hf.open_weights(path)
        case "mistral":
            return mistral.open_weights(path)
        case "gguf":
            return gguf.open_weights(path)


def read_model(path: str | Path) -> config.Model:
    """Read the architecture of the model at `path`."""
    match layout_of(path):
        case "hf":
            return hf.read_model_config(path)
        case "mistral":
            return mistral.read_model_config(path)
        case "gguf":
            return gguf.read_model(path)


def load_parameters(path: str | Path, abstract: Abstract) -> Parameters:
    """Read the weights of a model into arrays.

    The host holds one device's part of one array at a time.

    Args:
        path: the model.
        abstract: {path: shape, dtype and sharding}. It may contain only some of the weights; adapters are not among them.

    Raises:
        ValueError: the tensors are not those of the architecture, or do not fill every array.
    """
    weights = _checked(path, abstract)
    return fill(abstract, weights.table, weights.tensors)


def leave_parameters(path: str | Path, abstract: Abstract) -> dict[str, InFiles]:
    """Return the weights of `load_parameters` lazily, each read when it is needed. Raises the errors of `load_parameters`."""
    weights = _checked(path, abstract)
    return leave(abstract, weights.table, weights.tensors)


def _checked(path: str | Path, abstract: Abstract) -> Weights:
    weights = open_weights(path)
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    names.check(path, weights.table, shapes, {path: like.shape for path, like in unquantized_shapes(abstract).items()})
    return weights


def hashes(path: str | Path) -> dict[str, str]:
    """Return the sha256 of each tensor that `load_parameters` reads, by its name in the files; processes share the reading."""
    return together.tensor_hashes(open_weights(path).tensors)
