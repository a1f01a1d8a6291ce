"""FLOPs of a run, counted by hand for a tiny model."""

from __future__ import annotations

import pytest

from moe_train import config
from moe_train.governance.compute import training_flops
from moe_train.model.flops import flops_per_token
from tests.governance.lineages import lineage_of


def test_every_position_of_every_step_counts(tmp_path):
    training = lineage_of(tmp_path).training
    per_token = flops_per_token(training.run.model, 32)
    assert training_flops(training) == pytest.approx(per_token * 8 * 32 * 3)


def test_lora_takes_less_than_full_training(tmp_path):
    (tmp_path / "lora").mkdir()
    full = training_flops(lineage_of(tmp_path).training)
    lora = training_flops(lineage_of(tmp_path / "lora", lora=True).training)
    assert 0.6 * full < lora < full


def test_the_forward_pass_of_a_reference_counts(tmp_path):
    training = lineage_of(tmp_path, lora=True).training
    objective = config.Preference(name="preference", loss="sigmoid")
    compared = training._replace(run=training.run.model_copy(update={"objective": objective}))
    forward = flops_per_token(training.run.model, 32) / 3 * 8 * 32 * 3
    assert training_flops(compared) == pytest.approx(training_flops(training) + forward)
