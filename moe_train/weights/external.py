"""External models of any layout: from disk into sharded arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from moe_train import config
from moe_train.model.parameters import Parameters
from moe_train.model.paths import ParameterPath
from moe_train.model.quantize import unquantized_shapes
from moe_train.weights import gguf, hf, mistral, names, peft, safetensors_files, together
from moe_train.weights.arrays import Abstract, LazyArray, fill, open_lazily
from moe_train.weights.hf.config_keys import CONFIG_FILE
from moe_train.weights.mistral.files import STEM
from moe_train.weights.mistral.params_json import PARAMS_FILE
from moe_train.weights.on_disk import FileTensor, WeightFiles
from moe_train.weights.wrappers import encoders


def layout_of(path: str | Path) -> Literal["hf", "mistral", "gguf"]:
    """Detect the layout of the model at `path`; Hugging Face's if a folder has both, as Mistral's releases do.

    Raises:
        FileNotFoundError: there is no model; the message names the files that were looked for.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return "gguf"
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; a model is a folder with {CONFIG_FILE} or {PARAMS_FILE}, or a .gguf file")
    has_config = (path / CONFIG_FILE).is_file()
    has_params = (path / PARAMS_FILE).is_file()
    # config.json alone does not decide: the weights may be there only in Mistral's layout.
    if has_config and (safetensors_files.has_model(path) or not has_params):
        return "hf"
    if has_params:
        return "mistral"
    if gguf.file_in(path) is not None:
        return "gguf"
    if (path / peft.ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(
            f"{path} is an adapter, not a model; merge it into its base: moe-train adapters merge BASE {path} OUT"
        )
    raise FileNotFoundError(
        f"{path} has no model: looked for {CONFIG_FILE} (Hugging Face), {PARAMS_FILE} (Mistral's own layout) and one .gguf file; "
        "download the model there"
    )


def has_weights(path: str | Path) -> bool:
    """Return whether the weights of the model at `path` are there, and not only its config."""
    path = Path(path)
    stems = ("model", STEM)
    return gguf.file_in(path) is not None or any(safetensors_files.has_model(path, stem) for stem in stems)


def describe_choice(path: str | Path) -> str | None:
    """Say, in a line, what is read of a folder that has the same model in two layouts, or an adapter too; None for other models."""
    if layout_of(path) != "hf":
        return None
    lines: list[str] = []
    if _has_mistral_half(path):
        lines.append(f"{path} has the model in Hugging Face's and in Mistral's own layout; Hugging Face's files are read")
    if (Path(path) / peft.ADAPTER_CONFIG).is_file():
        lines.append(
            f"{path} also has a PEFT adapter, which transformers would load with the model, and which is not read; merge it with "
            "moe-train adapters merge, or move it"
        )
    return "; ".join(lines) or None


def _has_mistral_half(path: str | Path) -> bool:
    return (Path(path) / PARAMS_FILE).is_file() and safetensors_files.has_model(path, STEM)


@contextmanager
def _naming_the_other_half(path: str | Path) -> Iterator[None]:
    """Add to an error about Hugging Face's files that the folder has the model in Mistral's own layout too."""
    try:
        yield
    except ValueError as error:
        if not _has_mistral_half(path):
            raise
        raise ValueError(
            f"{error}; the folder also has the model in Mistral's own layout, which is read from a folder with {PARAMS_FILE}, "
            f"{STEM}*.safetensors and the tokenizer alone"
        ) from error


def open_external_weights(path: str | Path) -> WeightFiles:
    """Open the tensors of the model at `path` without reading them.

    Raises:
        FileNotFoundError: there is no model.
        ValueError: the model is damaged or its architecture is not supported.
    """
    match layout_of(path):
        case "hf":
            with _naming_the_other_half(path):
                return hf.open_weights(path)
        case "mistral":
            return mistral.open_weights(path)
        case "gguf":
            return gguf.open_weights(path)


def read_external_model(path: str | Path) -> config.Model:
    """Read the architecture of the model at `path`."""
    match layout_of(path):
        case "hf":
            with _naming_the_other_half(path):
                return hf.read_model_config(path)
        case "mistral":
            return mistral.read_model_config(path)
        case "gguf":
            return gguf.read_model_config(path)


def load_external_parameters(path: str | Path, abstract: Abstract) -> Parameters:
    """Read the weights of a model into arrays.

    The host holds one device's part of one array at a time.

    Args:
        path: the model.
        abstract: {path: shape, dtype and sharding}. It may contain only some of the weights; adapters are not among them.
            Those of a tower are read from the files of a multimodal model.

    Raises:
        ValueError: the tensors are not those of the architecture, or do not fill every array.
    """
    loaded: Parameters = {}
    for part in _open_parts(path, abstract):
        loaded |= fill(part.abstract, part.pieces, part.tensors)
    return loaded


_Encoder = TypeVar("_Encoder", config.VisionEncoder, config.AudioEncoder)


def read_encoder(path: str | Path, section: type[_Encoder]) -> _Encoder:
    """Return the sizes of the tower and the projector of the multimodal model at `path`.

    Args:
        path: the model.
        section: the kind of tower.

    Raises:
        ValueError: the model has no tower of this kind, or one that this package cannot compute.
    """
    weights = open_external_weights(path)
    encoder = encoders.encoder_of(encoders.require_tower(path, weights.carried, section), weights.model, Path(path))
    assert isinstance(encoder, section)  # as `require_tower` has checked
    return encoder


def find_encoder(path: str | Path) -> config.Encoder | None:
    """Return the sizes of the tower of the model at `path`; None for a text model, or one with a quantized tower."""
    weights = open_external_weights(path)
    for section in (config.VisionEncoder, config.AudioEncoder):
        if encoders.tower_fault(weights.carried, section) is None:
            return encoders.encoder_of(encoders.require_tower(path, weights.carried, section), weights.model, Path(path))
    return None


def open_external_lazily(path: str | Path, abstract: Abstract) -> dict[str, LazyArray]:
    """Return the weights as lazy arrays, each read when it is needed; otherwise like `load_external_parameters`."""
    opened: dict[str, LazyArray] = {}
    for part in _open_parts(path, abstract):
        opened |= open_lazily(part.abstract, part.pieces, part.tensors)
    return opened


class _Part(NamedTuple):
    """Arrays of a model, and where they are in its files."""

    abstract: Abstract
    pieces: list[names.WeightPiece]
    tensors: Mapping[str, FileTensor]


def _open_parts(path: str | Path, abstract: Abstract) -> Iterator[_Part]:
    """Yield the arrays of the text model, and those of its vision or audio tower if there are any."""
    of_text = {name: like for name, like in abstract.items() if not ParameterPath.parse(name).is_tower}
    of_tower = {name: like for name, like in abstract.items() if name not in of_text}
    weights = _open_and_check(path, of_text) if of_text else open_external_weights(path)
    yield _Part(of_text, weights.pieces, weights.tensors)
    if of_tower:
        is_vision = any(ParameterPath.parse(name).is_vision for name in of_tower)
        section = config.VisionEncoder if is_vision else config.AudioEncoder
        carried = encoders.require_tower(path, weights.carried, section)
        yield _Part(of_tower, encoders.pieces_of(carried, weights.model), encoders.tensors_of(carried))


def _open_and_check(path: str | Path, abstract: Abstract) -> WeightFiles:
    """Open a model, and check that its tensors are those of its architecture and fill every array of `abstract`."""
    weights = open_external_weights(path)
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    # Files hold unquantized weights, so a quantized array is compared by the shape of what it stands for.
    names.check_file_tensors(
        path, weights.pieces, shapes, {path: like.shape for path, like in unquantized_shapes(abstract).items()}
    )
    return weights


def hash_external_model(path: str | Path) -> dict[str, str]:
    """Return the sha256 of each tensor of the text model, by its name in the files; processes share the reading."""
    return together.hash_tensors_in_shares(open_external_weights(path).tensors)


def hash_carried(path: str | Path) -> dict[str, str]:
    """Return the sha256 of each tensor of a multimodal model's tower and projector, by name; {} for a text model."""
    carried = open_external_weights(path).carried
    return {} if carried is None else together.hash_tensors_in_shares(carried.tensors)
