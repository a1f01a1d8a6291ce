"""A self-test that has passed is not repeated until something that it depends on changes."""

from __future__ import annotations

from pathlib import Path

import jax
import jaxlib
import pytest

import moe_train
from moe_train.machine.compile_cache import ProgramCache
from moe_train.run import self_test_results
from moe_train.run.self_test_results import passed_once


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ProgramCache:
    cache = ProgramCache(tmp_path)
    monkeypatch.setattr(self_test_results, "current_cache", lambda: cache)
    return cache


def fails() -> float:
    raise RuntimeError("the kernel is wrong")


def test_a_passed_test_is_not_repeated(cache: ProgramCache) -> None:
    assert passed_once("attention", {"T": 128}, lambda: 1.5e-7) == (1.5e-7, False)
    assert passed_once("attention", {"T": 128}, fails) == (1.5e-7, True)
    for name, settings in (("attention", {"T": 256}), ("grouped_matmul", {"T": 128})):
        with pytest.raises(RuntimeError):
            passed_once(name, settings, fails)
        with pytest.raises(RuntimeError):  # what failed is not kept
            passed_once(name, settings, fails)


@pytest.mark.parametrize("changed", ["jax", "jaxlib", "moe_train", "source", "flags", "damaged"])
def test_a_test_is_repeated_after_a_change(cache: ProgramCache, monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    passed_once("attention", {}, lambda: 1.0)
    match changed:
        case "jax" | "jaxlib" | "moe_train":
            monkeypatch.setattr({"jax": jax, "jaxlib": jaxlib, "moe_train": moe_train}[changed], "__version__", "99")
        case "source":
            monkeypatch.setattr(self_test_results, "_source_digest", lambda: "of other files")
        case "flags":
            monkeypatch.setenv("XLA_FLAGS", "--xla_something")
        case "damaged":
            (file,) = cache.folder.iterdir()
            file.write_bytes(file.read_bytes().replace(b"1.0", b"0.0"))
    assert passed_once("attention", {}, lambda: 2.0) == (2.0, False)


def test_without_a_cache_every_start_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test_results, "current_cache", lambda: None)
    for error in (1.0, 2.0):
        assert passed_once("attention", {}, lambda error=error: error) == (error, False)
