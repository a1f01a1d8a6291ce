"""The proof of a scaled PEFT adapter: the same tensors and settings, and every alpha multiplied by the factor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from moe_train.machine.files import read_object
from moe_train.proof import reread
from moe_train.proof.checks import Fault

_SETTINGS_FILE = "adapter_config.json"


def prove_scaled(directory: Path, source: Path, factor: float) -> None:
    """Raise Fault unless the adapter in `directory` is the one in `source` with its scales multiplied by `factor`."""
    before = reread.tensors(source)
    after = reread.tensors(directory)
    different = sorted(before.keys() ^ after.keys())
    if different:
        raise Fault(f"{directory} and {source} do not have the same tensors: only one of them has {different[0]}")
    for name, tensor in after.items():
        if _content(tensor) != _content(before[name]):
            raise Fault(f"{name} in {directory} differs from that in {source}")
    alphas, other_settings = _settings(read_object(source / _SETTINGS_FILE))
    scaled, scaled_other_settings = _settings(read_object(directory / _SETTINGS_FILE))
    if scaled_other_settings != other_settings or scaled.keys() != alphas.keys():
        raise Fault(f"{directory / _SETTINGS_FILE} differs from that in {source} in more than its alphas")
    for key, alpha in alphas.items():
        if not math.isclose(scaled[key], factor * alpha, rel_tol=1e-12):
            raise Fault(f"{directory / _SETTINGS_FILE}: the alpha of {key} is {scaled[key]}, not {factor} x {alpha}")


def _settings(settings: dict[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """Split settings into (alphas by their pattern, all other settings)."""
    # PEFT writes `alpha_pattern` as null or {} if no module has an alpha of its own.
    alphas = {"lora_alpha": settings["lora_alpha"], **(settings.get("alpha_pattern") or {})}
    return alphas, {key: value for key, value in settings.items() if key not in ("lora_alpha", "alpha_pattern")}


def _content(tensor: reread.Stored) -> tuple[str, tuple[int, ...], bytearray]:
    with tensor.file.open("rb") as file:
        return tensor.kind, tensor.shape, tensor.read(file.fileno(), 0, tensor.rows)
