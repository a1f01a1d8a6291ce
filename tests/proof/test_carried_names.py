"""The proof's own names of towers agree with the writer's tables, in both directions."""

from __future__ import annotations

import pytest

from moe_train.proof.carried_names import POSITIONS, ROTATED, converted_name
from moe_train.proof.checks import Fault
from moe_train.weights.wrappers import towers
from moe_train.weights.wrappers.classes import WRAPPERS, WrapperClass

LAYERS = {"vision_config": {"num_hidden_layers": 12}, "audio_config": {"num_hidden_layers": 12}}


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_names_are_those_of_the_writer(wrapper: WrapperClass) -> None:
    audio = wrapper.encoder == "whisper"
    for row in towers.tower_tensors(towers.settings_of(wrapper, LAYERS, 16)):
        if row.native is None:
            assert row.name == POSITIONS
            continue
        assert converted_name(row.name, "mistral", audio) == row.native
        assert converted_name(row.native, "hf", audio) == row.name
        assert bool(ROTATED.fullmatch(row.native)) == bool(row.heads)


def test_a_tensor_without_a_name_is_found() -> None:
    for name, layout, audio in (("vision_tower.odd.weight", "mistral", False), (POSITIONS, "mistral", True)):
        with pytest.raises(Fault, match="has no name in Mistral's layout"):
            converted_name(name, layout, audio)  # type: ignore[arg-type]
