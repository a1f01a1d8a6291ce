"""Keep the memory that training on a CPU frees, so that no step fetches the same pages from the kernel again.

XLA:CPU allocates the temporaries of a program for each execution and frees them afterwards. glibc returns blocks of that size to
the kernel, so that each step of workload S (tests/benchmarks) touches 172,000 new pages of zeros: a tenth of its processor time.
Kept, they are touched once. The process then stays as large as it was at its largest, which a training step reaches anyway.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys

# Parameters of mallopt(3), from malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4
_ARENA_MAX = -8
_OWN_SETTINGS = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
"""Variables by which a user sets the same parameters; with any of them nothing is changed."""
_ACCELERATOR_MODULES = ("jax_plugins", "libtpu")
"""Packages by which JAX finds a GPU or a TPU."""


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory in the process if JAX will run on the CPU; call it before JAX is imported.

    Returns:
        Whether it does; False on accelerators, without glibc, after the import of JAX (whose threads have heaps of their own, which
        cannot hold large blocks), and where the environment sets glibc's parameters.
    """
    if sys.platform != "linux" or "jax" in sys.modules or not _runs_on_cpu():
        return False
    if any(name in os.environ for name in _OWN_SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # One heap for all threads, which grows for large blocks too, and never shrinks. mallopt returns 1 if it knows a parameter.
    return all(mallopt(parameter, value) for parameter, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)))


def _runs_on_cpu() -> bool:
    """Return whether JAX will use the CPU: it is asked to, or finds nothing else."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms == "cpu"
    return not any(importlib.util.find_spec(module) for module in _ACCELERATOR_MODULES)
