"""Names of PEFT for adapters and whole weights."""

from __future__ import annotations

from moe_train.weights.peft.pieces import adaptable_pieces, saved_pieces, tied_head
from tests.tiny import MINISTRAL, MIXTRAL

LAYER = "base_model.model.model.layers.0."


def test_everything_but_norms_can_have_an_adapter() -> None:
    names = [piece.name for piece in adaptable_pieces(MIXTRAL)]
    assert len(names) == len(set(names)) == 2 * (2 + 4 * (4 + 1 + 3 * 4))
    assert {f"{LAYER}block_sparse_moe.gate.lora_A.weight", f"{LAYER}block_sparse_moe.experts.2.w1.lora_B.weight"} <= set(names)
    assert not any("norm" in name for name in names)


def test_whole_weights_have_the_names_of_transformers_and_experts_are_none() -> None:
    names = {piece.name for piece in saved_pieces(MIXTRAL)}
    assert len(names) == 3 + 4 * (2 + 4 + 1)
    assert f"{LAYER}mlp.gate.weight" in names and not any("experts" in name for name in names)


def test_a_tied_table_is_saved_under_two_names() -> None:
    head = tied_head(MINISTRAL)
    assert (head.name, head.path) == ("base_model.model.lm_head.weight", "embed.weight")
    paths = [piece.path for piece in saved_pieces(MINISTRAL)]
    assert paths.count("embed.weight") == 2 and "head.weight" not in paths
