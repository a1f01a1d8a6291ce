"""Read and check adapter_config.json."""

from __future__ import annotations

import math
import re
from pathlib import Path

from moe_train.machine.files import JsonObject, read_object
from moe_train.weights.peft.pieces import ADAPTER_CONFIG

_REQUIRED: JsonObject = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "layers_to_transform": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
}
"""Keys for which only one value is supported; None also allows an empty list."""
_FUSED_PARAMETERS = ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
"""Ends of the names in target_parameters that are supported."""


def read_settings(directory: Path) -> JsonObject:
    """Read the settings of an adapter.

    Raises:
        FileNotFoundError: there is no adapter_config.json.
        ValueError: the settings are malformed or not supported.
    """
    file = directory / ADAPTER_CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; give a directory with a PEFT adapter")
    settings = read_object(file)
    for key in ("target_parameters", "modules_to_save"):
        entries = settings.get(key) or []
        if not isinstance(entries, list) or not all(isinstance(name, str) for name in entries):
            raise ValueError(f"{file}: {key} is {entries!r}; it has to be a list of names")
    _check_alphas(file, settings)
    for key, value in _REQUIRED.items():
        if settings.get(key, value) not in (value, [] if value is None else value):
            raise ValueError(f"{file}: {key} is {settings[key]!r}, which is not supported; it has to be {value!r}")
    for name in settings.get("target_parameters") or ():
        if not name.endswith(_FUSED_PARAMETERS):
            supported = ", ".join(_FUSED_PARAMETERS)
            raise ValueError(f"{file}: target_parameters has {name!r}; supported are names that end in {supported}")
    return settings


def _check_alphas(file: Path, settings: JsonObject) -> None:
    """Raise ValueError unless every alpha is a positive number, and every key of the patterns a regular expression."""
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{file}: alpha_pattern is {patterns!r}; it has to be an object")
    for key, alpha in {"lora_alpha": settings.get("lora_alpha"), **patterns}.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
            raise ValueError(f"{file}: {key} is {alpha!r}; an alpha has to be a positive number")
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"{file}: alpha_pattern has {key!r}, which is not a regular expression: {error}") from error


def alpha_of(settings: JsonObject, module: str) -> float:
    """Return the alpha of a module by its name in the model: that of the first matching pattern, else lora_alpha."""
    for key, alpha in (settings.get("alpha_pattern") or {}).items():
        # PEFT matches a pattern against the end of a module's name, from a dot on.
        if re.match(rf"(.*\.)?({key})$", module):
            return float(alpha)
    return float(settings["lora_alpha"])
