"""The cores that this process may run on."""

import os


def cpu_cores() -> int:
    """Return the number of cores that the process may run on, which containers and `taskset` limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
