"""What `moe-train explain` says about a key."""

from __future__ import annotations

from moe_train.commands.explain import explain_key, list_keys


def test_a_key_is_explained_with_the_recipes_that_state_it() -> None:
    (meaning,) = explain_key("compute.remat", "config")
    assert meaning["type"] == "minimal or full" and meaning["default"] == '"minimal"'
    assert 'mixtral_8x7b_lora_h100x8 ("minimal")' in meaning["stated by recipes"]


def test_a_required_key_and_one_of_a_suite() -> None:
    assert explain_key("train.batch_size", "config")[0]["default"] == "none; it must be stated"
    assert "stated by recipes" not in explain_key("grader.tolerance", "suite")[0]


def test_the_keys_below_a_section_are_listed() -> None:
    below = [row["key"] for row in list_keys("config", "data.train[].record")]
    assert "data.train[].record.column" in below and "data.train[].weight" not in below
    assert len(list_keys("config")) > 150
