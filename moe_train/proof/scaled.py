"""The proof of a scaled PEFT adapter: the same tensors and settings, and every alpha multiplied by the factor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from moe_train.machine.files import read_object
from moe_train.proof import reread
from moe_train.proof.checks import Fault

CONFIG = "adapter_config.json"


def prove_scaled(directory: Path, source: Path, factor: float) -> None:
    """Raise Fault unless the adapter in `directory` is the one in `source` with its scales multiplied by `factor`."""
    before = reread.tensors(source)
    after = reread.tensors(directory)
    if different := sorted(before.keys() ^ after.keys()):
        raise Fault(f"{directory} has other tensors than {source}: {different[0]}")
    for name, tensor in after.items():
        if _content(tensor) != _content(before[name]):
            raise Fault(f"{name} in {directory} is not that of {source}")
    alphas, other_settings = _settings(read_object(source / CONFIG))
    scaled, scaled_other_settings = _settings(read_object(directory / CONFIG))
    if scaled_other_settings != other_settings or scaled.keys() != alphas.keys():
        raise Fault(f"{directory / CONFIG} has other settings than that of {source}")
    for key, alpha in alphas.items():
        if not math.isclose(scaled[key], factor * alpha, rel_tol=1e-12):
            raise Fault(f"{directory / CONFIG}: the alpha of {key} is {scaled[key]}, not {factor} x {alpha}")


def _settings(settings: dict[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """Split settings into (alphas by their pattern, all other settings)."""
    alphas = {"lora_alpha": settings["lora_alpha"], **(settings.get("alpha_pattern") or {})}
    return alphas, {key: value for key, value in settings.items() if key not in ("lora_alpha", "alpha_pattern")}


def _content(tensor: reread.Stored) -> tuple[str, tuple[int, ...], bytearray]:
    with tensor.file.open("rb") as file:
        return tensor.kind, tensor.shape, tensor.read(file.fileno(), 0, tensor.rows)
