"""The persistent cache of compiled programs that all commands share, so that a second start compiles nothing.

JAX has a cache of its own, but it writes entries in place: a process that is killed meanwhile leaves a truncated entry, which is
never replaced, and without a checksum a flipped bit becomes machine code. Here an entry appears complete or not at all and is
verified when it is read; a damaged one is removed and compiled again.

| environment                     | folder                                                            |
|---------------------------------|-------------------------------------------------------------------|
| MOE_TRAIN_COMPILE_CACHE=off     | none, as with `--no-compile-cache`                                |
| JAX_COMPILATION_CACHE_DIR=DIR   | DIR, by JAX's own cache and its other settings                    |
| MOE_TRAIN_COMPILE_CACHE=DIR     | DIR; on several hosts a folder that all of them share             |
| otherwise, one process          | $XDG_CACHE_HOME/moe_train/compile, ~/.cache/moe_train/compile     |
| otherwise, several processes    | `compile` in the run's folder, which all hosts share              |

With several processes only the first one writes, which is JAX's rule; so a folder that they do not share would not help them.
A program in the cache is code that will run: the folder must not be writable for people who are not trusted.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
from jax._src import compilation_cache  # JAX has no public way to replace its cache
from jax._src.compilation_cache_interface import CacheInterface

from moe_train.machine import processes
from moe_train.machine.cores import cpu_cores
from moe_train.machine.files import write_bytes

VARIABLE = "MOE_TRAIN_COMPILE_CACHE"
"""Environment variable that names the folder of the cache; "off" for no cache."""
MAX_BYTES = 2 * 2**30
"""Largest size of a cache: some thousands of programs for CPUs, a hundred for TPU slices."""
MIN_COMPILE_SECONDS = 0.05
"""Programs that compile faster are not cached, since reading them takes about as long."""
_SUFFIX = ".entry"
_UNFINISHED = f"{_SUFFIX}.unfinished-"
"""Part of the names that `files.write_bytes` writes under before it renames."""
_STALE_SECONDS = 3600
"""Age at which an unfinished file belongs to a process that was killed."""
_DIGEST_BYTES = hashlib.sha256().digest_size

log = logging.getLogger(__name__)


class ProgramCache(CacheInterface):
    """A folder of checked entries, {key: bytes}, of bounded size; the entries used least recently are removed first.

    No operation fails: an entry that cannot be read counts as missing. What went wrong is logged, once for each cause.

    Args:
        folder: created when the first entry is written; the folder above it must exist if `needs_parent`.
        max_bytes: largest size of all entries together.
        needs_parent: write nothing before the folder above `folder` exists, which is not the cache's to create.
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES, needs_parent: bool = False):
        self.folder = folder
        self._path = folder  # the name that JAX expects
        self._max_bytes = max_bytes
        self._needs_parent = needs_parent
        self._is_broken = False

    def get(self, key: str) -> bytes | None:
        """Return the value of a key, or None if there is no complete entry of it."""
        file = self._file(key)
        try:
            content = file.read_bytes()
            # The time of the last use, for eviction; the file system's own access times are often switched off. A cache of
            # another account, or on a file system that is mounted read-only, can still be read.
            with contextlib.suppress(OSError):
                os.utime(file)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._give_up("read", error)
            return None
        digest = content[:_DIGEST_BYTES]
        value = content[_DIGEST_BYTES:]
        if digest == _digest(key, value):
            return value
        log.warning(f"moe-train: {file} is damaged; it was removed, and is made again")
        with contextlib.suppress(OSError):
            file.unlink()
        return None

    def put(self, key: str, value: bytes) -> None:
        """Store a value, and remove the entries used least recently until all fit."""
        if self._is_broken or len(value) > self._max_bytes or (self._needs_parent and not self.folder.parent.exists()):
            return
        try:
            # For the owner only: whoever may write here may run code as the owner.
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_bytes(self._file(key), _digest(key, value) + value)
            self._evict()
        except OSError as error:
            self._give_up("write", error)

    def _file(self, key: str) -> Path:
        name = hashlib.sha256(f"{key} {_host_cpu()}".encode()).hexdigest()
        return self.folder / f"{name}{_SUFFIX}"

    def _evict(self) -> None:
        entries = []
        for entry in os.scandir(self.folder):
            # Another process may remove the entry meanwhile.
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                if entry.name.endswith(_SUFFIX):
                    entries.append((status.st_mtime_ns, status.st_size, entry.path))
                elif _UNFINISHED in entry.name and time.time() - status.st_mtime > _STALE_SECONDS:
                    os.unlink(entry.path)
        excess = sum(size for _, size, _ in entries) - self._max_bytes
        for _, size, path in sorted(entries):
            if excess <= 0:
                return
            Path(path).unlink(missing_ok=True)
            excess -= size

    def _give_up(self, verb: str, error: OSError) -> None:
        """Log that the folder cannot be used, and write no more."""
        if not self._is_broken:
            reason = error.strerror or str(error)
            log.warning(
                f"moe-train: cannot {verb} the compilation cache {self.folder} ({reason}), so each start compiles anew; "
                f"set {VARIABLE} to a folder that can be written, or to off"
            )
        self._is_broken = True


def _digest(key: str, value: bytes) -> bytes:
    """Return the checksum of an entry; it covers the key, so that a renamed file is no other program."""
    return hashlib.sha256(key.encode() + b"\0" + value).digest()


@functools.cache
def _host_cpu() -> str:
    """Return the instruction set and the number of cores of this host if programs run on it: a folder may be shared by others.

    XLA:CPU splits loops for the cores that it finds when it compiles; JAX's key does not contain their number.
    """
    if jax.default_backend() != "cpu":
        return ""
    # Not the model's name alone: a virtual machine may hide instructions.
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return f"{platform.machine()} {line.partition(':')[2].strip()} {cpu_cores()}"
    return f"{platform.machine()} {platform.processor()} {platform.node()} {cpu_cores()}"


def use_compile_cache(run_dir: str | Path | None = None) -> ProgramCache | None:
    """Cache the programs that this process compiles from now on.

    Args:
        run_dir: folder of the run that a job of several processes works on, on a file system that its hosts share.

    Returns:
        The cache; None if there is none, or if it is JAX's own.
    """
    global _current
    if os.environ.get(VARIABLE) == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        _current = None
    elif jax.config.values["jax_compilation_cache_dir"] is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        _current = _cache_for(os.environ, run_dir)
        if _current is not None:
            _install(_current)
    return _current


_current: ProgramCache | None = None


def current_cache() -> ProgramCache | None:
    """Return the cache that `use_compile_cache` turned on; None without one."""
    return _current


def _cache_for(env: Mapping[str, str], run_dir: str | Path | None) -> ProgramCache | None:
    """Return the cache that an environment asks for."""
    max_bytes = _max_bytes(env)
    if env.get(VARIABLE):
        return ProgramCache(Path(env[VARIABLE]).expanduser().absolute(), max_bytes)
    if processes.job(env) is not None:
        return None if run_dir is None else ProgramCache(Path(run_dir).absolute() / "compile", max_bytes, needs_parent=True)
    # The XDG specification: a relative path is invalid and ignored.
    base = Path(env.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        base = Path(os.path.expanduser("~/.cache"))
    # An account without a home directory.
    if not base.is_absolute():
        return None
    return ProgramCache(base / "moe_train" / "compile", max_bytes)


def _max_bytes(env: Mapping[str, str]) -> int:
    """Return the largest size of the cache; JAX's variable, of which -1 is no limit, replaces the default."""
    text = env.get("JAX_COMPILATION_CACHE_MAX_SIZE")
    if text is None:
        return MAX_BYTES
    try:
        size = int(text)
    except ValueError:
        raise ValueError(f"JAX_COMPILATION_CACHE_MAX_SIZE is {text!r}; it must be a number of bytes, or -1 for no limit") from None
    return sys.maxsize if size == -1 else size


def _install(cache: ProgramCache) -> None:
    """Let JAX read and write compiled programs through `cache`."""
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    # XLA's own caches for GPUs have no bound.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    jax.config.update("jax_compilation_cache_dir", str(cache.folder))
    compilation_cache.reset_cache()
    compilation_cache._cache = cache
    compilation_cache._cache_initialized = True
