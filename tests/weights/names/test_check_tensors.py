"""Files that do not hold the model that their config describes."""

from __future__ import annotations

import pytest

from moe_train.weights import names
from tests.weights.names.models import SMALL, shapes_of, small_files


def test_missing_extra_and_wrong_tensors_are_named_in_one_line() -> None:
    files, shapes, table = small_files(), shapes_of(SMALL), names.weight_pieces(SMALL)
    bad = dict(files)
    del bad["lm_head.weight"]
    bad["model.layers.0.self_attn.q_norm.weight"] = (2,)
    bad["model.norm.weight"] = (7,)
    with pytest.raises(ValueError) as caught:
        names.check_file_tensors("here", table, bad, shapes)
    message = str(caught.value)
    assert "\n" not in message
    assert "lacks lm_head.weight" in message
    assert "self_attn.q_norm.weight, which" in message
    assert "model.norm.weight of shape (7,) instead of (6,)" in message


def test_parameters_that_no_tensor_fills_are_named() -> None:
    shapes = shapes_of(SMALL)
    with pytest.raises(ValueError, match=r"has no tensors for stacks\.0\.layers\.0\.ffn\.up_proj\.lora_a"):
        names.check_file_tensors(
            "here", names.weight_pieces(SMALL), small_files(), shapes | {"stacks.0.layers.0.ffn.up_proj.lora_a": (2, 3, 6, 4)}
        )
    some = {p: s for p, s in shapes.items() if p != "head.weight"}
    names.check_file_tensors("here", names.weight_pieces(SMALL), small_files(), some)
    with pytest.raises(ValueError, match=r"embed\.weight has shape \(17, 6\)"):
        names.check_file_tensors("here", names.weight_pieces(SMALL), small_files(), shapes | {"embed.weight": (17, 6)})
