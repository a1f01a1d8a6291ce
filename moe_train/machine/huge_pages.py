"""Huge pages for the large blocks of memory of a program that trains on CPUs.

XLA:CPU allocates the temporaries of each step anew, and glibc returns blocks of their size to the kernel. With pages of 4 KiB the
kernel then takes a tenth of a step to provide them again (docs/measurements.md). glibc asks for huge pages if it is told to when a
process starts, so the program starts itself once more.

Until the first step has been taken the kernel does not grant them: weights are drawn and programs compiled in memory that is used
once, and a virtual machine may have to ask its host for each huge page, which takes milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
"""Environment variable with the settings of glibc, separated by colons."""
_SETTING = "glibc.malloc.hugetlb"
_COMMANDS = ("train", "bench", "sweep", "quickstart")
"""Commands that train; the others are too short to gain, or hold large files in memory."""
_FIRST_GLIBC = (2, 35)
"""First version that knows the setting."""
_KERNEL_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_ACCELERATORS = ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0")
"""Device files of GPUs and TPUs."""
_PR_SET_THP_DISABLE, _PR_GET_THP_DISABLE = 41, 42
"""Requests of prctl(2): whether the kernel grants huge pages to this process, which a program that it starts inherits."""


def restart_with_huge_pages(arguments: Sequence[str]) -> None:
    """Replace this process by itself with huge pages, if it trains on CPUs and neither the user nor the machine decided otherwise.

    They are granted from `grant_huge_pages` on.

    To be called before anything slow is imported; it takes as long as Python takes to start.

    Args:
        arguments: arguments of the command line, without the program's name.
    """
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    if command not in _COMMANDS or not _is_supported() or not _trains_on_cpus(os.environ):
        return
    tunables = os.environ.get(TUNABLES, "")
    if _SETTING in tunables or not sys.executable:
        return
    settings = [setting for setting in (tunables, f"{_SETTING}=1") if setting]
    _withhold_huge_pages(True)
    # The arguments of the interpreter too, such as `-m moe_train`. A start that fails leaves this process as it is.
    with contextlib.suppress(OSError):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, TUNABLES: ":".join(settings)})
    _withhold_huge_pages(False)


def grant_huge_pages() -> None:
    """Let the kernel give huge pages to this process from now on, if they were asked for; to be called after a step."""
    if f"{_SETTING}=1" in os.environ.get(TUNABLES, ""):
        _withhold_huge_pages(False)


def _withhold_huge_pages(withheld: bool) -> None:
    """Tell the kernel whether to give huge pages to those parts of memory for which they are asked."""
    ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, int(withheld), 0, 0, 0)


def _is_supported() -> bool:
    """Return whether glibc knows the setting, and the kernel grants huge pages to those who ask, this process among them."""
    if "CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}):
        return False
    name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    numbers = tuple(int(part) for part in version.split(".") if part.isdecimal())
    if name != "glibc" or numbers < _FIRST_GLIBC:
        return False
    try:
        granted = "[never]" not in _KERNEL_SETTING.read_text(encoding="ascii")
    except OSError:
        return False
    return granted and ctypes.CDLL(None).prctl(_PR_GET_THP_DISABLE, 0, 0, 0, 0) == 0


def _trains_on_cpus(env: Mapping[str, str]) -> bool:
    """Return whether JAX will compute on CPUs, as far as can be seen without starting it."""
    if env.get("JAX_PLATFORMS"):
        return env["JAX_PLATFORMS"].lower() == "cpu"
    return not any(Path(device).exists() for device in _ACCELERATORS)
