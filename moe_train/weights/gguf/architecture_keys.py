"""The keys of one architecture in a GGUF file that another tool wrote."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_train.weights.gguf.container import GgufSettings


class ArchitectureKeys:
    """The keys of one architecture in a file that another tool wrote; remembers which of them were read."""

    def __init__(self, arch: str, settings: GgufSettings) -> None:
        self.arch = arch
        self._settings = settings
        self._read: set[str] = set()

    def get(self, key: str, default: str | float | None = None) -> Any:
        """Return the value of `ARCH.key`. Raises ValueError if it is missing and has no default."""
        self._read.add(f"{self.arch}.{key}")
        value = self._settings.get(f"{self.arch}.{key}", default)
        if value is None:
            raise ValueError(f"the key {self.arch}.{key} is missing; convert the model again")
        if isinstance(value, np.ndarray):  # one value per layer
            if len({*value.tolist()}) != 1:
                raise ValueError(f"{self.arch}.{key} differs between layers, which is not implemented")
            value = value[0].item()
        return value

    def get_float(self, key: str, default: float | None = None) -> float:
        """Return a float32 value as the shortest decimal that rounds to it."""
        # float32's 1e-5 would otherwise become 9.999999747378752e-06 and differ from the same model's config.json.
        return float(str(np.float32(self.get(key, default))))

    def unread(self) -> list[str]:
        """Return the keys of the architecture that were not read."""
        return sorted(key for key in self._settings if key.startswith(f"{self.arch}.") and key not in self._read)
