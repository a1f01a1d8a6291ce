"""Results of self-tests, kept next to the compiled programs: what passed is not repeated until something it depends on changes.

A result belongs to a kernel with its shapes, a kind of device, the versions of JAX, of the compiler and of this package's own
source, and the flags of the compiler. Only passed tests are kept.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jaxlib

import moe_train
from moe_train.machine.compile_cache import current_cache
from moe_train.machine.files import Json

_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_ENABLE_X64")
"""Environment variables that change what a kernel computes."""


def passed_once(name: str, settings: Json, test: Callable[[], float]) -> tuple[float, bool]:
    """Return the error that a self-test measures, from the cache if the same test has passed before.

    Args:
        name: name of the test.
        settings: everything that the test depends on, besides versions, flags and the kind of device.
        test: the test; it raises if the kernel is wrong.

    Returns:
        The largest relative error, and whether it comes from an earlier start.
    """
    cache = current_cache()
    if cache is None:
        return test(), False
    key = json.dumps(["self-test", name, settings, _surroundings()], sort_keys=True)
    stored = cache.get(key)
    if stored is not None:
        return float(stored), True
    error = test()
    cache.put(key, repr(error).encode())
    return error, False


def _surroundings() -> Json:
    """Return the kind of device, the versions and the flags under which this process runs."""
    device = jax.local_devices()[0]
    return {
        "device": [device.platform, device.device_kind, device.client.platform_version],
        "versions": [jax.__version__, jaxlib.__version__, moe_train.__version__, _source_digest()],
        "flags": {name: os.environ.get(name) for name in _FLAGS},
    }


@functools.cache
def _source_digest() -> str:
    """Return a digest of the source of the models and of the self-tests, which changes more often than the version."""
    package = Path(moe_train.__file__).parent
    digest = hashlib.sha256()
    for file in sorted([*(package / "model").rglob("*.py"), *(package / "run").glob("self_test*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()
