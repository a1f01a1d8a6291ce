"""The recipes that come with the package can be listed, shown and copied."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.commands.recipes import FOLDER, copy_recipe, recipe, recipes, values_of
from moe_train.config.yaml_file import load_config


def test_every_recipe_states_its_purpose_hardware_time_and_command() -> None:
    assert {entry.name for entry in recipes()} == {file.stem for file in FOLDER.glob("*.yaml")}
    for entry in recipes():
        assert entry.purpose and {"Hardware", "Time", "Command"} <= set(entry.facts), entry.name


@pytest.mark.parametrize("name", ["mixtral_8x7b_lora", "../pyproject"])
def test_a_recipe_that_is_not_there_suggests_others(name: str) -> None:
    with pytest.raises(ValueError, match=f"there is no recipe {name}; there are ") as error:
        recipe(name)
    assert name.startswith("..") or "mixtral_8x7b_lora_v5e" in str(error.value)


def test_a_copy_has_its_data_beside_it_and_loads(tmp_path: Path) -> None:
    out = tmp_path / "new" / "mine.yaml"
    written = copy_recipe("tool_dialogue_chatml", out)
    assert written == [out, tmp_path / "new" / "tool_dialogue.jsonl"]
    assert "configs/" not in out.read_text() and f"train {out}" in out.read_text()
    data = load_config(out).data
    assert data is not None and str(written[1]) in str(data.train[0])
    with pytest.raises(FileExistsError, match=r"mine\.yaml"):
        copy_recipe("quickstart_lora", out)


def test_values_of_a_key_are_found_inside_lists() -> None:
    assert values_of("lora.targets[].rank")["mixtral_8x7b_lora_h100x8"] == [16]
    assert values_of("train.steps") and not values_of("train.spike_guard.window")
