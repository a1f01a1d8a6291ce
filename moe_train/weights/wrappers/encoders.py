"""A vision or audio tower in files as weights of our model: its sizes as a config section, and the place of every matrix."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from moe_train import config
from moe_train.weights.names.pieces import WeightPiece
from moe_train.weights.on_disk import Carried, FileTensor
from moe_train.weights.wrappers import audio_pieces, vision_pieces
from moe_train.weights.wrappers.towers import PixtralSettings
from moe_train.weights.wrappers.whisper import WhisperSettings


class _Tower(NamedTuple):
    """Towers for pictures, or for sound."""

    settings: type[PixtralSettings | WhisperSettings]
    """The sizes of such a tower as its files state them."""
    name: str
    """The section of a config, for messages."""
    article: str
    needs: str
    """What needs such a tower, for messages."""


_TOWERS: dict[type[config.Encoder], _Tower] = {
    config.VisionEncoder: _Tower(PixtralSettings, "vision", "a", "pictures need"),
    config.AudioEncoder: _Tower(WhisperSettings, "audio", "an", "sound needs"),
}


def require_tower(path: object, carried: Carried | None, section: type[config.Encoder]) -> Carried:
    """Return the parts around a text model. Raises ValueError unless they are an unquantized tower and its projector.

    Args:
        path: the model, for messages.
        carried: the parts; None for a text model.
        section: the kind of tower.
    """
    fault = tower_fault(carried, section)
    if fault is not None:
        raise ValueError(f"{path} {fault}")
    assert carried is not None
    return carried


def tower_fault(carried: Carried | None, section: type[config.Encoder]) -> str | None:
    """Say why the parts around a text model see no pictures, or hear nothing, for a message; None if they do."""
    kind = _TOWERS[section]
    if carried is None or not isinstance(carried.settings, kind.settings):
        parts = "no tower" if carried is None else f"the {carried.parts}"
        needed = f"{kind.needs} {kind.article} {kind.name} tower"
        return f"has {parts}, but {needed}; name a model with one, or leave {kind.name} out"
    for name, tensor in carried.tensors.items():
        if tensor.dtype.itemsize == 1:
            return (
                f"has a quantized {kind.name} tower ({name} is {tensor.dtype}), and {kind.needs} it in bfloat16 or float32; start "
                "from the unquantized release"
            )
    return None


def is_computed(carried: Carried) -> bool:
    """Return whether the parts around a text model are a tower that this package can compute; a quantized one is not."""
    return any(tower_fault(carried, section) is None for section in _TOWERS)


def encoder_of(carried: Carried, model: config.Model, path: Path) -> config.Encoder:
    """Return the sizes of a tower and its projector.

    Args:
        carried: the tower in files (`require_tower`).
        model: the text model, whose norms the projector's follows in Hugging Face's layout.
        path: the folder, for messages; the preprocessor there states the largest picture.

    Raises:
        ValueError: the tower computes something that this package does not.
    """
    is_audio = isinstance(carried.settings, WhisperSettings)
    pieces = audio_pieces if is_audio else vision_pieces
    section: type[config.Encoder] = config.AudioEncoder if is_audio else config.VisionEncoder
    kind = _TOWERS[section]
    for key, (value, only) in pieces.required_settings(carried).items():
        if value != only:
            raise ValueError(f"{path}: {key} is {value!r}, and {kind.needs} a tower with {only!r}")
    try:
        return section.model_validate(pieces.sizes_of(carried, model, path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: the {kind.name} tower is not supported: {key} {first['msg']}") from error


def pieces_of(carried: Carried, model: config.Model) -> list[WeightPiece]:
    """List every weight of a tower and its projector in the layout of its files.

    Args:
        carried: the tower in files (`require_tower`).
        model: the text model.
    """
    pieces = audio_pieces if isinstance(carried.settings, WhisperSettings) else vision_pieces
    return pieces.pieces_of(carried, model)


def tensors_of(carried: Carried) -> Mapping[str, FileTensor]:
    """Return the tensors of a tower by name, those that readers of its layout compute included."""
    if isinstance(carried.settings, WhisperSettings):
        return audio_pieces.tensors_of(carried)
    return carried.tensors
