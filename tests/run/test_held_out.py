"""Held-out loss and routing drift during a run."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.checkpoint import model_dir
from moe_train.commands.evaluate import evaluate_model
from moe_train.data.batches.batch import BatchRows
from moe_train.data.batches.loader import Loader
from moe_train.data.tokenizers.load import load_tokenizer
from moe_train.machine.mesh import make_mesh, put_batch
from moe_train.model.parameters import parameters
from moe_train.model.transformer import abstract_model
from moe_train.run.held_out import DRIFT_BATCHES, drift_batches
from tests.run.tiny_config import LORA, MODEL, written
from tests.run_dir import lines


def test_held_out_loss_is_the_mean_over_loss_tokens(finished, small_run, text, tmp_path):
    """Against log-softmax of all logits at once, and against the command's function, which names what it does not read."""
    run = small_run(finished)
    loader = Loader(run.data, "eval", load_tokenizer(run.data.tokenizer), BatchRows(8, 32), seed=0)
    total = count = 0.0
    with jax.set_mesh(make_mesh(run.mesh)):
        shapes = parameters(abstract_model(run.model, run.compute))
        model = shapes[0].unflatten([model_dir.load_parameters(finished, shapes[1])[path] for path in shapes[1]])
        logits_of = jax.jit(lambda batch: model.logits(model(batch.tokens, batch.positions, batch.segment_ids)[0]))
        for batch in loader.iterate():
            log_probs = jax.nn.log_softmax(np.asarray(logits_of(put_batch(batch, make_mesh(run.mesh))), np.float64))
            chosen = np.take_along_axis(np.asarray(log_probs), batch.targets[..., None], axis=-1)[..., 0]
            total, count = total - float(np.sum(chosen * batch.loss_mask)), count + batch.loss_mask.sum()
    said = lines(finished, "eval")[-1]
    assert said["loss_tokens"] == count and said["loss"] == pytest.approx(total / count, rel=1e-5)
    noted = tmp_path / "noted.jsonl"
    noted.write_text("".join(line.replace("{", '{"note": 1, ', 1) for line in (text / "eval.jsonl").open()))
    answer = evaluate_model(finished, [noted])
    assert answer["not_read"] == "note (20 records)"
    assert answer["loss"] == pytest.approx(said["loss"], rel=1e-5) and answer["loss_tokens"] == count
    assert answer["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.parametrize(
    ("sections", "batches"),
    [
        ({}, 0),
        ({"lora": LORA}, DRIFT_BATCHES),
        ({"lora": LORA, "evaluation": {"drift_batches": 2}}, 2),
        ({"lora": LORA, "evaluation": {"drift_batches": 0}}, 0),
        ({"lora": LORA, "model": {**MODEL, "family": "mistral", "ffn": {"name": "dense", "ffn_dim": 16}}, "loss": {}}, 0),
    ],
    ids=["full training", "adapters", "stated", "none", "no router"],
)
def test_batches_on_which_routing_is_compared(sections: dict, batches: int) -> None:
    assert drift_batches(config.run_of(written(**{"model": MODEL, "init_from": "base", **sections}))) == batches
