"""When reference log-probabilities are stored; `tests/integration/test_preference_run.py` has whole runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moe_train import config
from moe_train.checkpoint.metadata import WeightOrigin
from moe_train.run.reference import add_reference, model_hash
from moe_train.train.objectives.choose import objective_of
from tests.tiny import ONE

DPO = config.Preference(name="preference")
SIMPO = config.Preference(name="preference", loss="simpo")


@pytest.mark.parametrize(("section", "frozen"), [(DPO, {"a": 1}), (SIMPO, {}), (config.NextToken(name="next_token"), {})])
def test_nothing_is_stored_where_nothing_is_needed(section: Any, frozen: Any) -> None:
    begin: Any = SimpleNamespace(state=SimpleNamespace(frozen=frozen), base=None)
    nothing: Any = None
    add_reference(SimpleNamespace(objective=section), nothing, begin, objective_of(section), ONE, nothing)  # type: ignore[arg-type]


def test_random_weights_are_no_reference() -> None:
    begin: Any = SimpleNamespace(state=SimpleNamespace(frozen={}), base=None)
    nothing: Any = None
    with pytest.raises(ValueError, match=r"objective preference compares .* state init_from, or a loss without a reference"):
        add_reference(SimpleNamespace(objective=DPO), nothing, begin, objective_of(DPO), ONE, nothing)  # type: ignore[arg-type]


def test_a_model_is_known_by_its_bytes_and_not_by_its_place() -> None:
    first, second = (WeightOrigin(source, None, {"a": "1", "b": "2"}) for source in ("x", "y"))
    assert model_hash(first) == model_hash(second._replace(hashes={"b": "2", "a": "1"}))
    assert model_hash(first) != model_hash(first._replace(hashes={"a": "1", "b": "3"}))
