"""Stored log-probabilities: read by example, and refused where they belong to something else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_train.data.prepared.reference import ReferenceIdentity, StoredReference, reference_folder, write_reference

IDENTITY = ReferenceIdentity("set", "0123456789abcdef01", 5, 5)
LENGTHS = np.array([2, 0, 3])
SET: Any = SimpleNamespace(hash="f" * 64)


def test_each_example_has_its_own(tmp_path: Path) -> None:
    folder = reference_folder(str(tmp_path), "cache", SET, IDENTITY, is_prepared=True)
    assert folder == tmp_path / "reference-0123456789abcdef"
    write_reference(folder, IDENTITY, np.arange(5))
    stored = StoredReference(folder, IDENTITY, LENGTHS)
    assert [stored.read(i).tolist() for i in range(3)] == [[0, 1], [], [2, 3, 4]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"set_hash": "other"}, "another prepared set"),
        ({"model_sha256": "x"}, "another model"),
        ({"positions": 6}, "another packing"),
        ({"computed": 4}, "another train.seq_len"),
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
