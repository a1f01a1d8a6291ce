"""What every test runs under: eight fake CPU devices, shapes checked against annotations, the marks `slow` and `judges`."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Drawn alike in each run, however busy the machine is; with --slow anew.
settings.register_profile("alike", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("anew", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("anew" if "--slow" in sys.argv else "alike")
jax.config.update("jax_num_cpu_devices", 8)
install_import_hook("moe_train.model", "beartype.beartype")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take a minute or more")
    parser.addoption("--judges", action="store_true", help="also run the comparisons with torch, transformers and peft")


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name a test by the size of its bytes: workers must collect equal names, and a packed file can hold the time."""
    return f"{len(val)}-bytes" if isinstance(val, bytes) else None


def pytest_configure(config: pytest.Config) -> None:
    missing = [name for name in ("torch", "transformers", "peft") if importlib.util.find_spec(name) is None]
    if config.getoption("--judges") and missing:
        raise pytest.UsageError(f"--judges needs {', '.join(missing)}; run: bash launch/test.sh --judges")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--judges"):
        why = "compares with torch, transformers or peft; run: bash launch/test.sh --judges"
        for item in items:
            if item.get_closest_marker("judges"):
                item.add_marker(pytest.mark.skip(reason=why))
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
