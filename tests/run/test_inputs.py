"""The opened data of a run."""

from __future__ import annotations

import jax
import pytest

from moe_train import config
from moe_train.machine.mesh import make_mesh
from moe_train.run.inputs import open_inputs
from moe_train.run.resolve import resolve
from moe_train.train.objectives.next_token import next_token


def test_length_in_epochs_and_tokens(small_run, tmp_path):
    run = small_run(tmp_path, train={"epochs": 2, "batch_size": 8, "seq_len": 32})
    with jax.set_mesh(make_mesh(run.mesh)):
        loader = open_inputs(resolve(run, 8), next_token()).train
    assert loader.total_steps(run.train) == loader.steps(2) == pytest.approx(2 * loader.num_rows / 8, abs=1)
    tokens = config.Train(tokens=8 * 32 * 5 + 1, batch_size=8, seq_len=32)
    assert loader.total_steps(tokens) == 6


def test_held_out_data_are_read_in_microbatches(small_run, tmp_path):
    run = resolve(small_run(tmp_path, train__microbatches=2, mesh={"fsdp": 4}), 4)
    inputs = open_inputs(run, next_token())
    assert inputs.held_out.batch(0).tokens.shape == (4, 32) and inputs.train.batch(0).tokens.shape == (8, 32)
    assert inputs.total_steps == 6 and inputs.tokenizer.vocab_size == 280
    assert open_inputs(run.model_copy(update={"data": run.data.model_copy(update={"eval": ()})}), next_token()).held_out is None
