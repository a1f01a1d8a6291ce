"""The cache of compiled programs: shared by commands, bounded, and never a reason for a run to stop."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax._src import compilation_cache

from moe_train.machine import compile_cache
from moe_train.machine.compile_cache import ProgramCache, use_compile_cache


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.entry"))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An environment that says nothing about caches; JAX's settings are restored afterwards."""
    names = (
        *("jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_persistent_cache_enable_xla_caches"),
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE", compile_cache.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    monkeypatch.setattr(compile_cache, "_current", None)
    yield monkeypatch
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    jax.clear_caches()


def test_a_second_start_compiles_nothing(fresh: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    x = jnp.float32(2)
    fresh.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = use_compile_cache()
    assert cache is not None and cache.folder == tmp_path / "moe_train" / "compile"

    def run(x: jax.Array) -> list[str]:
        """Return the names of the entries after a start that computes 3 x + 1."""
        jax.clear_caches()
        assert jax.jit(lambda x: 3 * x + 1)(x) == 7
        return [file.name for file in entries(cache.folder)]

    names = run(x)
    assert names
    stamps = [file.stat().st_ino for file in entries(cache.folder)]
    assert run(x) == names and [file.stat().st_ino for file in entries(cache.folder)] == stamps  # read, not written
    for file in entries(cache.folder):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with caplog.at_level(logging.WARNING, "moe_train"):
        assert run(x) == names
    lines = [record.message for record in caplog.records]
    assert len(lines) == len(names) and all("is damaged; it was removed" in line for line in lines)


def test_a_folder_that_cannot_be_written_stops_nothing(
    fresh: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    fresh.setenv(compile_cache.VARIABLE, str(tmp_path / "file" / "cache"))
    use_compile_cache()
    x = jnp.float32(2)
    with caplog.at_level(logging.WARNING, "moe_train"):
        for factor in (3.0, 5.0):
            assert jax.jit(lambda x, factor=factor: factor * x)(x) == 2 * factor
    assert len(caplog.records) == 1
    assert f"{tmp_path}/file/cache (Not a directory)" in caplog.records[0].message


def test_a_folder_that_is_mounted_read_only_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ProgramCache(tmp_path)
    cache.put("a", b"program a")

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(os, "utime", refuse)
    assert cache.get("a") == b"program a"


@pytest.mark.parametrize("damage", ["cut", "empty", "renamed"])
def test_only_complete_entries_are_read(tmp_path: Path, damage: str) -> None:
    cache = ProgramCache(tmp_path)
    cache.put("a", b"program a")
    cache.put("b", b"program b")
    file = cache._file("a")
    content = {"cut": file.read_bytes()[:-1], "empty": b"", "renamed": cache._file("b").read_bytes()}[damage]
    file.write_bytes(content)
    assert cache.get("a") is None and not file.exists()
    assert cache.get("b") == b"program b"


def test_the_entries_used_least_recently_are_removed(tmp_path: Path) -> None:
    cache = ProgramCache(tmp_path, max_bytes=300)
    (tmp_path / "notes.txt").write_text("of somebody else")
    for age, key in enumerate("cba"):
        cache.put(key, bytes(50))
        os.utime(cache._file(key), ns=(10**9 * age, 10**9 * age))
    unfinished = tmp_path / ".x.entry.unfinished-1"
    unfinished.touch()
    os.utime(unfinished, (0, 0))
    assert cache.get("c") is not None  # the oldest is used again
    cache.put("d", bytes(50))
    assert [key for key in "abcd" if cache.get(key) is not None] == ["a", "c", "d"]
    cache.put("too large", bytes(301))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".entry"] * 3 + [".txt"]


def test_what_the_user_has_set_wins(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    assert use_compile_cache() is None and jax.config.jax_compilation_cache_dir is None  # left to JAX
    fresh.delenv("JAX_COMPILATION_CACHE_DIR")
    fresh.setenv("XDG_CACHE_HOME", "relative")
    fresh.setenv("HOME", str(tmp_path))
    cache = use_compile_cache()
    assert cache is not None and cache.folder == tmp_path / ".cache" / "moe_train" / "compile"
    fresh.setenv(compile_cache.VARIABLE, "off")
    assert use_compile_cache() is None and not jax.config.jax_enable_compilation_cache


def test_several_processes_share_the_folder_of_their_run(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each host's own folder would help the first one only, since no other process writes."""
    for name, value in (("COORDINATOR_ADDRESS", "host:1"), ("NUM_PROCESSES", "2"), ("PROCESS_ID", "0")):
        fresh.setenv(f"JAX_{name}", value)
    assert use_compile_cache() is None
    cache = use_compile_cache(tmp_path / "run")
    assert cache is not None and cache.folder == tmp_path / "run" / "compile"
    cache.put("a", b"")
    assert not (tmp_path / "run").exists()  # the run's folder is the run's to make
    (tmp_path / "run").mkdir()
    cache.put("a", b"program")
    assert cache.get("a") == b"program"


def test_a_size_that_is_no_number_is_refused(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("XDG_CACHE_HOME", str(tmp_path))
    fresh.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "2GB")
    with pytest.raises(ValueError, match="JAX_COMPILATION_CACHE_MAX_SIZE is '2GB'; it must be a number of bytes"):
        use_compile_cache()


def test_a_program_for_another_number_of_cores_is_another_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ProgramCache(tmp_path / "compile")
    cache.put("key", b"program")
    try:
        for cores, expected in ((set(range(len(os.sched_getaffinity(0)) + 1)), None), (os.sched_getaffinity(0), b"program")):
            monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: cores)
            compile_cache._host_cpu.cache_clear()
            assert cache.get("key") == expected
    finally:
        compile_cache._host_cpu.cache_clear()
