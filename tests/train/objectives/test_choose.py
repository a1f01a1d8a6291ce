"""Every objective of the config has its file."""

from __future__ import annotations

from typing import get_args

import pytest

from moe_train import config
from moe_train.train.objectives.choose import objective_of

# Settings that have no default, by section.
REQUIRED: dict[type, dict[str, object]] = {config.Classification: {"labels": {"topic": ["a", "b"]}}}

SECTIONS = get_args(get_args(config.Objective)[0])  # the union inside of Annotated


@pytest.mark.parametrize("section", SECTIONS)
def test_an_objective_is_named_as_its_file(section: type[config.NextToken]) -> None:
    (name,) = get_args(section.model_fields["name"].annotation)
    loss = objective_of(section.model_validate({"name": name, **REQUIRED.get(section, {})})).loss
    # An objective with settings binds them to its function.
    assert getattr(loss, "func", loss).__module__ == f"moe_train.train.objectives.{name}"
