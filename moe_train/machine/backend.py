"""What JAX's backends are started with, and what to do if JAX cannot start the one that JAX_PLATFORMS asks for."""

from __future__ import annotations

import os
import traceback

GPU_MEMORY = "XLA_PYTHON_CLIENT_MEM_FRACTION"
"""Variable with the share of a GPU's memory that JAX allocates when it starts."""
_GPU_SHARE = "0.9"
_EXTRAS = {"cuda": "cuda", "gpu": "cuda", "tpu": "tpu"}
"""Backend in JAX_PLATFORMS -> extra of this package that installs it."""


def use_gpu_memory() -> None:
    """Let programs use nine tenths of a GPU's memory, where JAX would take three quarters, unless the environment states a share.

    Call it before JAX starts a backend.
    """
    os.environ.setdefault(GPU_MEMORY, _GPU_SHARE)


def backend_failure(error: Exception) -> str | None:
    """Describe an error in which JAX could not start a backend, in one line; None for any other error.

    JAX raises a RuntimeError, or an AssertionError without a message where the plugin of the backend is not installed.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not frames[-1].filename.endswith("xla_bridge.py"):
        return None
    platforms = os.environ.get("JAX_PLATFORMS", "")
    reason = str(error).partition(" (set JAX_PLATFORMS")[0] or "its plugin is not installed"
    extras = list(dict.fromkeys(_EXTRAS[name] for name in platforms.lower().split(",") if name in _EXTRAS))
    remedy = "unset JAX_PLATFORMS to use what this machine has"
    if extras:
        remedy = f"install it with `bash launch/install.sh {' '.join(extras)}`, or {remedy}"
    return f"JAX cannot start the backend of JAX_PLATFORMS={platforms}: {reason}; {remedy}"
