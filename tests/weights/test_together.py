"""A single process agrees with itself; several are started in integration/test_processes.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train.weights import together
from tests.tiny import EIGHT


def test_one_process_is_the_first_and_agrees_with_itself() -> None:
    assert together.is_first() and together.from_first("text") == "text"
    assert together.all_agree(True) and not together.all_agree(False)


def test_a_directory_appears_when_all_is_written(tmp_path: Path) -> None:
    with together.one_directory(tmp_path / "out") as directory:
        (directory / "a").write_text("a")
        assert not (tmp_path / "out").exists()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["a"]
    with pytest.raises(OSError, match="disk"), together.one_directory(tmp_path / "other"):
        raise OSError("disk")
    assert not (tmp_path / "other").exists()


def test_a_failure_is_raised_at_the_end_of_the_block() -> None:
    with pytest.raises(ValueError, match="mine"), together.all_or_none():
        raise ValueError("mine")


def test_what_others_wait_for_is_made_to_the_end_even_if_writing_fails() -> None:
    made = []

    def parts() -> Iterator[int]:
        for part in range(3):
            made.append(part)
            yield part

    def write(parts: Iterator[int]) -> None:
        next(parts)
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        together.first_writes(parts(), write)
    assert made == [0, 1, 2]


def test_a_sharded_array_is_gathered_whole() -> None:
    array = jax.device_put(np.arange(16.0).reshape(4, 4), NamedSharding(EIGHT, P("fsdp", "tensor")))
    (found,) = together.gather_on_each_process({"x": array}).values()
    assert len(found.sharding.device_set) == 1 and jnp.array_equal(found, np.arange(16.0).reshape(4, 4))


def test_hashes_of_one_process_are_all_its_own() -> None:
    assert together.hash_in_shares({"a": 1, "b": 2}, lambda names: {name: name * 2 for name in names}) == {"a": "aa", "b": "bb"}
