"""The table of multimodal classes is consistent with the table of families."""

from __future__ import annotations

import pytest

from moe_train import config
from moe_train.weights.wrappers.classes import WRAPPERS, wrapper_of_type


@pytest.mark.parametrize("architecture", WRAPPERS)
def test_a_row_is_found_by_its_type_and_has_texts(architecture: str) -> None:
    row = WRAPPERS[architecture]
    assert wrapper_of_type(row.model_type) is row and row.architecture == architecture
    assert row.families() and set(row.families()) <= config.FAMILIES.keys()
    assert {"text_config", row.section} <= set(row.keys)


@pytest.mark.parametrize("model_type", ["mistral", None, ["mistral3"]])
def test_other_types_are_no_wrappers(model_type: object) -> None:
    assert wrapper_of_type(model_type) is None
