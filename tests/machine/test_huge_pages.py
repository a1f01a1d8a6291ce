"""A program that trains starts once more with huge pages, with the arguments and the exit code that it had."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train.machine import huge_pages
from moe_train.machine.huge_pages import TUNABLES, restart_with_huge_pages

PROGRAM = """
import os, sys
from moe_train.machine.huge_pages import TUNABLES, restart_with_huge_pages
restart_with_huge_pages(sys.argv[1:])
print(os.getpid(), os.environ.get(TUNABLES), *sys.argv[1:])
sys.exit(7)
"""


def started(arguments: list[str], **environment: str) -> tuple[bool, list[str]]:
    """Whether the process kept its number, and what it printed after it."""
    env = {name: value for name, value in os.environ.items() if name != TUNABLES} | {"JAX_PLATFORMS": "cpu"} | environment
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], env=env, stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate()
    assert process.returncode == 7
    number, *words = output.split()
    return int(number) == process.pid, words


needs_huge_pages = pytest.mark.skipif(
    not huge_pages._is_supported(), reason="glibc or the kernel of this machine has no huge pages"
)

GRANTED = """
import ctypes, mmap, sys
from moe_train.machine.huge_pages import _PR_GET_THP_DISABLE, grant_huge_pages, restart_with_huge_pages

def is_withheld():
    return ctypes.CDLL(None).prctl(_PR_GET_THP_DISABLE, 0, 0, 0, 0)

def huge_kilobytes():
    with mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory.write(bytes(8 << 20))
        return sum(int(line.split()[1]) for line in open("/proc/self/smaps") if line.startswith("AnonHugePages"))

restart_with_huge_pages(["train"])
before = (is_withheld(), huge_kilobytes())
grant_huge_pages()
print(*before, is_withheld(), huge_kilobytes())
"""


@needs_huge_pages
def test_huge_pages_are_granted_when_a_step_has_been_taken() -> None:
    env = {name: value for name, value in os.environ.items() if name != TUNABLES} | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.run([sys.executable, "-c", GRANTED], env=env, capture_output=True, text=True, check=True)
    withheld_before, before, withheld_after, after = map(int, process.stdout.split())
    assert (withheld_before, before, withheld_after) == (1, 0, 0)
    if after == 0:
        pytest.skip("they are granted, but the kernel has no whole one left")
    assert after >= 2048  # kilobytes, a page


@needs_huge_pages
def test_it_starts_once_more_as_the_same_process() -> None:
    assert started(["--debug", "train", "a b.yaml"]) == (True, ["glibc.malloc.hugetlb=1", "--debug", "train", "a", "b.yaml"])
    other = "glibc.malloc.arena_max=2"
    assert started(["bench"], **{TUNABLES: other}) == (True, [f"{other}:glibc.malloc.hugetlb=1", "bench"])


def test_it_leaves_other_commands_accelerators_and_decisions_alone() -> None:
    assert started(["export", "train"]) == (True, ["None", "export", "train"])
    assert started(["train"], JAX_PLATFORMS="cuda,cpu") == (True, ["None", "train"])
    assert started(["train"], **{TUNABLES: "glibc.malloc.hugetlb=0"}) == (True, ["glibc.malloc.hugetlb=0", "train"])


@pytest.mark.parametrize("version", ["glibc 2.31", "musl 1.2", ""])
def test_an_older_or_another_library_does_not_restart(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(os, "confstr", lambda name: version)
    monkeypatch.setattr(os, "execve", lambda *arguments: pytest.fail("it was started again"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv(TUNABLES, raising=False)
    restart_with_huge_pages(["train"])


def test_a_start_that_fails_leaves_the_process_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setting = tmp_path / "enabled"
    setting.write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "_KERNEL_SETTING", setting)
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.39")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv(TUNABLES, raising=False)
    restart_with_huge_pages(["train"])
    assert TUNABLES not in os.environ
    assert ctypes.CDLL(None).prctl(huge_pages._PR_GET_THP_DISABLE, 0, 0, 0, 0) == 0
    # Nobody is granted huge pages.
    setting.write_text("always madvise [never]\n")
    monkeypatch.setattr(os, "execve", lambda *arguments: pytest.fail("it was started again"))
    restart_with_huge_pages(["train"])
