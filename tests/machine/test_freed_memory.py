"""Freed memory that stays in the process: counted in new pages, in a process without JAX."""

from __future__ import annotations

import subprocess
import sys

import pytest

from moe_train.machine.freed_memory import keep_freed_memory

# Prints whether memory is kept, and how many pages of 4 KiB a second block of 64 MiB touches anew.
PROGRAM = """
import ctypes, resource
from moe_train.machine.freed_memory import keep_freed_memory
is_kept = keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = ctypes.c_void_p(libc.malloc(64 << 20))
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(is_kept, pages)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
@pytest.mark.parametrize(
    ("env", "is_kept"),
    [
        ({"JAX_PLATFORMS": "cpu"}, True),
        ({"JAX_PLATFORMS": "tpu,cpu"}, False),
        ({"JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "2"}, False),
    ],
    ids=["cpu", "accelerator", "own settings"],
)
def test_a_block_of_the_same_size_touches_no_new_page(env: dict[str, str], is_kept: bool) -> None:
    # No huge pages, of which a block of 64 MiB would touch 32.
    env |= {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True)
    kept, pages = done.stdout.split()
    assert kept == str(is_kept)
    assert int(pages) < 100 if is_kept else int(pages) > 10_000


def test_a_process_that_has_imported_jax_is_left_alone() -> None:
    import jax  # noqa: F401

    assert not keep_freed_memory()
