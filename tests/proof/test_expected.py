"""What the files of each layout must hold, independent of the table of names."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from moe_train.weights import names
from moe_train.weights.texts import Texts
from tests.proof.exported import make


def test_a_slip_in_the_table_of_names_is_found(weights: Any, texts: Texts, tmp_path: Path, monkeypatch: Any) -> None:
    """Both the writer and the loader use the table: what they agree upon may still be wrong."""
    gate, up, down = names.MISTRAL.experts
    swapped = (gate._replace(name=up.name), up._replace(name=gate.name), down)
    monkeypatch.setattr(names, "MISTRAL", dataclasses.replace(names.MISTRAL, experts=swapped))
    with pytest.raises(RuntimeError, match=r"the proof failed \(tensors\): layers\.0\.feed_forward\.experts\.0\.w1"):
        make(tmp_path / "out", weights, texts, "mistral", "float32")
