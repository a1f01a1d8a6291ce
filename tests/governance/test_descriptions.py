"""The tables that documents share: several places of one set, and each machine once."""

from __future__ import annotations

from moe_train.data.pictures.rules import PictureRules
from moe_train.data.sound.rules import SoundRules
from moe_train.governance.descriptions import machines, modalities, sets_table
from moe_train.governance.training_summary import training_summary
from tests.governance.lineages import SET, lineage_of


def test_many_files_of_a_set_are_counted_and_no_manifest_is_a_todo(tmp_path):
    training = lineage_of(tmp_path).training
    many = SET.model_copy(update={"files": SET.files * 5})
    assert "`dialogues.jsonl` and 2 more" in sets_table(training._replace(data=(many,)))
    assert sets_table(training._replace(data=())).startswith("TODO")


def test_a_machine_that_a_run_came_back_to_is_named_once(tmp_path):
    assert machines(lineage_of(tmp_path).training) == ["16 x TPU v5p"]


def test_pictures_are_a_modality(tmp_path):
    training = lineage_of(tmp_path).training
    assert modalities(training) == ["text"]
    rules = PictureRules(14, 2, 1540, 10, 12, 13)
    training = training._replace(data=(SET, SET.model_copy(update={"media": rules})))
    assert modalities(training) == ["text", "image"]
    assert "| image | pictures in records; TODO" in training_summary("m", (training,), "2026-11-03")


def test_sound_is_a_modality(tmp_path):
    training = lineage_of(tmp_path).training
    rules = SoundRules(16000, 128, 160, 400, 3000, 8, 24, 25)
    training = training._replace(data=(SET.model_copy(update={"media": rules}),))
    assert modalities(training) == ["text", "audio"]
    assert "| audio | sound in records; TODO" in training_summary("m", (training,), "2026-11-03")
