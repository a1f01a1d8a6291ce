"""The table of families: it is complete, and the checks follow it."""

from __future__ import annotations

from typing import get_args

import pytest

from moe_train.config.families import FAMILIES, FEATURES, FamilyName, Feature, describe_features, family_with


def test_every_name_has_a_row_and_every_feature_has_words() -> None:
    assert tuple(FAMILIES) == get_args(FamilyName)
    assert tuple(FEATURES) == get_args(Feature)
    assert len({row.hugging_face.architecture for row in FAMILIES.values()}) == len(FAMILIES)


@pytest.mark.parametrize(
    ("features", "sparse", "family"),
    [
        ((), False, "mistral"),
        (("window", "tied_embeddings"), False, "mistral"),
        (("window", "interleaved_windows"), False, "ministral"),
        (("yarn",), False, "ministral3"),
        (("window",), True, "mixtral"),
    ],
)
def test_the_first_family_that_may_have_the_features(features: tuple[Feature, ...], sparse: bool, family: str) -> None:
    assert family_with(features, sparse=sparse, file_format="mistral") == family


def test_features_that_no_family_has_together_are_named() -> None:
    with pytest.raises(ValueError, match=r"no sparse family can have all of a yarn rope and shared experts"):
        family_with(("shared_experts", "yarn"), sparse=True, file_format="mistral")


def test_features_in_the_order_of_the_table() -> None:
    assert describe_features({"router_bias", "sigmoid_router"}) == "a sigmoid router and a router bias"
    assert describe_features(()) is None
