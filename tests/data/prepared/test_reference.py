"""Stored log-probabilities: read by example, and refused where they belong to something else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_train.data.prepared.reference import (
    ReferenceIdentity,
    ReferenceWriter,
    StoredExperts,
    StoredReference,
    reference_folder,
)
from moe_train.data.prepared.reference_values import ReferenceValues

IDENTITY = ReferenceIdentity("set", "0123456789abcdef01", 5, 5)
LENGTHS = np.array([2, 0, 3])
SET: Any = SimpleNamespace(hash="f" * 64)


def write_reference(folder: Path, identity: ReferenceIdentity, logprobs: np.ndarray) -> None:
    folder.mkdir()
    writer = ReferenceWriter(folder, identity)
    writer.write(0, ReferenceValues(logprobs))
    writer.finish()


def test_each_example_has_its_own(tmp_path: Path) -> None:
    folder = reference_folder(str(tmp_path), "cache", SET, IDENTITY, is_prepared=True)
    assert folder == tmp_path / "reference-0123456789abcdef"
    write_reference(folder, IDENTITY, np.arange(5))
    stored = StoredReference(folder, IDENTITY, LENGTHS)
    assert [stored.read(i).logprobs.tolist() for i in range(3)] == [[0, 1], [], [2, 3, 4]]


@pytest.mark.parametrize(("count", "dtype"), [(256, np.uint8), (257, np.uint16)])
def test_chosen_experts_are_stored_beside_them(tmp_path: Path, count: int, dtype: Any) -> None:
    experts = StoredExperts(layers=3, per_token=2, num_experts=count)
    identity = IDENTITY._replace(expert_ids=6)
    writer = ReferenceWriter(tmp_path, identity, experts)
    ids = np.arange(18).reshape(3, 6) + count - 18
    # The first example fits into no row.
    writer.write(2, ReferenceValues(np.arange(3.0, dtype=np.float32), ids))
    writer.finish()
    stored = StoredReference(tmp_path, identity, LENGTHS, experts)
    logprobs, expert_ids = stored.read(2)
    assert logprobs.tolist() == [0, 1, 2] and np.isnan(stored.read(0).logprobs).all()
    assert expert_ids is not None and expert_ids.dtype == dtype and expert_ids.tolist() == ids.tolist()
    assert (tmp_path / "experts").stat().st_size == 5 * experts.bytes_per_position
    (tmp_path / "experts").write_bytes(bytes(5 * experts.bytes_per_position))
    with pytest.raises(ValueError, match=r"experts is damaged.*remove"):
        StoredReference(tmp_path, identity, LENGTHS, experts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"set_hash": "other"}, "another prepared set"),
        ({"model_sha256": "x"}, "another model"),
        ({"positions": 6}, "another packing"),
        ({"computed": 4}, "another train.seq_len"),
        ({"shared_prompt": True}, "another objective.shared_prompt"),
        ({"expert_ids": 4}, "another version, without the experts"),
    ],
)
def test_what_belongs_to_something_else_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_reference(tmp_path / "r", IDENTITY, np.arange(5))
    with pytest.raises(ValueError, match=f"{message}.*remove the folder"):
        StoredReference(tmp_path / "r", IDENTITY._replace(**change), LENGTHS)


def test_damage_is_found(tmp_path: Path) -> None:
    write_reference(tmp_path / "r", IDENTITY, np.arange(5))
    (tmp_path / "r" / "logprobs").write_bytes(bytes(20))
    with pytest.raises(ValueError, match="is damaged"):
        StoredReference(tmp_path / "r", IDENTITY, LENGTHS)


def test_a_named_set_with_another_models_log_probabilities_is_refused(tmp_path: Path) -> None:
    write_reference(tmp_path / "reference-ffff", IDENTITY, np.arange(5))
    with pytest.raises(ValueError, match="of another model than init_from"):
        reference_folder(str(tmp_path), "cache", SET, IDENTITY, is_prepared=True)
    assert reference_folder(str(tmp_path), "cache", SET, IDENTITY, is_prepared=False).parent == tmp_path
    assert reference_folder("s3://b/set", "cache", SET, IDENTITY, is_prepared=True).parts[:2] == ("cache", "references")
