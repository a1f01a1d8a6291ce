"""The tables that documents share: several places of one set, and each machine once."""

from __future__ import annotations

from moe_train.governance.descriptions import machines, sets_table
from tests.governance.lineages import SET, lineage_of


def test_many_files_of_a_set_are_counted_and_no_manifest_is_a_todo(tmp_path):
    training = lineage_of(tmp_path).training
    many = SET.model_copy(update={"files": SET.files * 5})
    assert "`dialogues.jsonl` and 2 more" in sets_table(training._replace(data=(many,)))
    assert sets_table(training._replace(data=())).startswith("TODO")


def test_a_machine_that_a_run_came_back_to_is_named_once(tmp_path):
    assert machines(lineage_of(tmp_path).training) == ["16 x TPU v5p"]
