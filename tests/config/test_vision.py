"""The sizes of a vision tower, and what the section on pictures needs of others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moe_train import config
from moe_train.config.checks import check_objective_of_pictures, check_vision

SIZES: dict[str, Any] = {"tower_dim": 8, "ffn_dim": 12, "num_layers": 1, "num_heads": 2, "patch_size": 2, "max_image_size": 8}


def test_sizes_that_follow_from_others() -> None:
    encoder = config.VisionEncoder(**SIZES, merge_size=2)
    assert (encoder.cell_size, encoder.patches_per_token, encoder.patch_values) == (2, 4, 12)
    assert config.VisionEncoder(**SIZES).patches_per_token == 1


def test_heads_that_cannot_rotate_by_rows_and_columns() -> None:
    with pytest.raises(ValueError, match="tower_dim 12 is not a multiple of 4 x num_heads 2"):
        config.VisionEncoder(**SIZES | {"tower_dim": 12})


def test_a_tower_has_to_fit_the_mesh() -> None:
    encoder = config.VisionEncoder(**SIZES, merge_size=2)
    sections: Any = SimpleNamespace(mesh=config.Mesh(context=2))
    check_vision(sections, encoder, 16)
    with pytest.raises(ValueError, match=r"patches_per_row 20 is not a multiple of 8.*use 24"):
        check_vision(sections, encoder, 20)
    with pytest.raises(ValueError, match="num_heads of the vision tower"):
        check_vision(SimpleNamespace(mesh=config.Mesh(tensor=4)), encoder, 16)  # type: ignore[arg-type]


def test_only_next_tokens_are_learned_from_pictures() -> None:
    check_objective_of_pictures(config.NextToken(name="next_token"))
    with pytest.raises(ValueError, match="no effect on objective preference"):
        check_objective_of_pictures(config.Preference(name="preference"))
