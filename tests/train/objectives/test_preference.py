"""Preference pairs: loss, gradients and metrics on every mesh equal a plain computation over all logits."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_train import config
from moe_train.machine.mesh import put_batch
from moe_train.model.parameters import combine, with_expert_ids
from moe_train.train.objectives.objective import DRIFT_METRIC
from moe_train.train.objectives.preference import preference
from moe_train.train.objectives.preference_losses import PairLogprobs, pair_losses
from moe_train.train.state import partition, trained_in_full
from tests.random_parameters import random_parameters
from tests.train.objectives.judged_rows import pair_rows, rows_of_both_layouts
from tests.train.tiny_step import LORA, MESHES, MODEL, ONE, check_equal, gradients, plain_logprobs, structure_of

DPO = config.Preference(name="preference", sft_weight=0.5)
ORPO = config.Preference(name="preference", loss="orpo")


def plain_loss(section: config.Preference, model: Any, base: Any, batch: Any) -> Any:
    """The mean over pairs, one pair after the other, and the mean likelihood over tokens."""
    _, logprobs = plain_logprobs(model, batch)
    _, reference = plain_logprobs(base, batch)
    numbers = np.arange(1, 5)[:, None, None]  # at most two pairs in a row
    of_answer = (batch.answer_ids == numbers) & batch.loss_mask

    def sums(values: Any) -> Any:
        return jnp.sum(jnp.where(of_answer, values, 0), axis=-1).reshape(2, 2, -1)

    logps, ref, n = sums(logprobs), sums(reference), sums(jnp.ones_like(logprobs))
    pairs = PairLogprobs(logps[:, 0], logps[:, 1], ref[:, 0], ref[:, 1], n[:, 0], n[:, 1])
    if not section.has_reference:
        pairs = pairs._replace(reference_chosen=0, reference_rejected=0)
    exists = n[:, 0] > 0
    safe = PairLogprobs(*(jnp.where(exists, x, -1.0) for x in pairs[:4]), *(jnp.where(exists, x, 1.0) for x in pairs[4:]))
    mean = jnp.sum(jnp.where(exists, pair_losses(section, safe), 0)) / jnp.sum(exists)
    likely = batch.answer_ids % 2 == 1
    if section.loss != "orpo":
        likely &= batch.loss_mask
    weight = 1.0 if section.loss == "orpo" else section.sft_weight
    return mean - weight * jnp.sum(jnp.where(likely, logprobs, 0)) / jnp.sum(likely)


@cache
def expected(section: config.Preference) -> tuple[Any, Any]:
    """(value, gradients) of `plain_loss` on one device."""
    with jax.set_mesh(ONE):
        learned, frozen = partition(random_parameters(MODEL, lora=LORA, scale=0.3), LORA)
        base = combine(structure_of(None), frozen, {path: x + 0.5 for path, x in trained_in_full(learned, LORA).items()})
        run = jax.jit(jax.value_and_grad(lambda p, f, b, base: plain_loss(section, combine(structure_of(LORA), p, f), base, b)))
        return jax.device_get(run(learned, frozen, put_batch(pair_rows()[0], ONE), base))


@cache
def expected_changes() -> np.ndarray:
    """Of each layer, the experts of all tokens that the model without adapters does not choose, token by token."""
    batch, _ = pair_rows()
    with jax.set_mesh(ONE):
        learned, frozen = partition(random_parameters(MODEL, lora=LORA, scale=0.3), LORA)
        base = {path: x + 0.5 for path, x in trained_in_full(learned, LORA).items()}

        def ids(lora: config.Lora | None, weights: Any) -> Any:
            model = combine(with_expert_ids(structure_of(lora)), weights, frozen)
            return model(batch.tokens, batch.positions, batch.segment_ids)[1].expert_ids

        of_both = jax.device_get((jax.jit(partial(ids, LORA))(learned), jax.jit(partial(ids, None))(base)))
    changes = np.zeros(len(of_both[0]), int)
    for layer, row, position in np.ndindex(len(changes), *batch.tokens.shape):
        if batch.segment_ids[row, position]:
            chosen, base_chosen = (set(ids[layer, row, position].tolist()) for ids in of_both)
            changes[layer] += len(chosen - base_chosen)
    return changes


@pytest.mark.parametrize(
    ("mesh", "microbatches"),
    [
        pytest.param("one device", 1, marks=pytest.mark.slow),
        ("data, fsdp, tensor", 2),
        pytest.param("fsdp, expert, context", 2, marks=pytest.mark.slow),
    ],
)
def test_every_mesh_gives_the_loss_and_the_gradients_of_a_plain_computation(mesh: str, microbatches: int) -> None:
    step = gradients(preference(DPO), MESHES[mesh], microbatches, LORA, rows=pair_rows()[0])
    check_equal(step, expected(DPO))
    batch, pieces = pair_rows()
    assert step.weight == len(pieces)
    drift = step.terms.metrics[DRIFT_METRIC]
    np.testing.assert_array_equal(drift.sum, expected_changes())
    assert 0 < drift.sum.max() < drift.weight == 2 * (batch.segment_ids != 0).sum()
    assert step.terms.routers is not None and step.terms.routers.expert_ids is None
    metrics: dict[str, Any] = {name: metric.sum / metric.weight for name, metric in step.terms.metrics.items()}
    assert metrics["rewards/margins"] == pytest.approx(metrics["rewards/chosen"] - metrics["rewards/rejected"], rel=1e-4)
    assert 0 < metrics["rewards/accuracies"] < 1 and metrics["logps/chosen"] < 0 < metrics["entropy"]
    assert step.terms.metrics["nll_loss"].weight == (batch.loss_mask & (batch.answer_ids % 2 == 1)).sum()


@cache
def step_with_two_prompts(section: config.Preference) -> Any:
    return gradients(preference(section), ONE, 1, LORA, rows=rows_of_both_layouts()[0])


@pytest.mark.parametrize(
    ("loss", "mesh", "microbatches"),
    [
        ("sigmoid", "fsdp, expert, context", 2),
        pytest.param("sigmoid", "data, fsdp, tensor", 1, marks=pytest.mark.slow),
        pytest.param("orpo", "one device", 2, marks=pytest.mark.slow),
        pytest.param("ipo", "one device", 1, marks=pytest.mark.slow),
    ],
)
def test_one_prompt_for_both_answers_changes_nothing_but_what_routers_count(loss: Any, mesh: str, microbatches: int) -> None:
    section = config.Preference(name="preference", loss=loss, sft_weight=0.0 if loss == "orpo" else 0.5)
    plain, shared = rows_of_both_layouts()
    expected = step_with_two_prompts(section)
    step = gradients(preference(section), MESHES[mesh], microbatches, LORA, rows=shared)
    check_equal(step, (expected.loss, expected.gradients), 1e-4)
    assert step.weight == expected.weight and step.terms.metrics.keys() == expected.terms.metrics.keys()
    for name, metric in step.terms.metrics.items():
        if name != DRIFT_METRIC:
            other = expected.terms.metrics[name]
            np.testing.assert_allclose(metric.sum / metric.weight, other.sum / other.weight, rtol=1e-4, atol=1e-6)
    # Each prompt but its last token is counted once.
    repeated = sum((plain.segment_ids != 0).sum(axis=1)) - sum((shared.segment_ids != 0).sum(axis=1))
    assert repeated > 50
    if section.has_reference:
        drift = [terms.metrics[DRIFT_METRIC].weight for terms in (expected.terms, step.terms)]
        assert drift[0] - drift[1] == 2 * repeated


@pytest.mark.slow
def test_orpo_adds_the_likelihood_of_whole_chosen_texts() -> None:
    step = gradients(preference(ORPO), ONE, 2, LORA, rows=pair_rows()[0])
    check_equal(step, expected(ORPO))
    assert not preference(ORPO).uses_reference and step.terms.metrics["log_odds_ratio"].sum < 0


@pytest.mark.slow
def test_full_training_reads_the_reference_from_the_batch() -> None:
    """With the log-probabilities of another model in the batch, the loss is that of adapters with this model as their base."""
    batch, _ = pair_rows()
    with jax.set_mesh(ONE):
        learned, frozen = partition(random_parameters(MODEL, lora=LORA, scale=0.3), LORA)
        base = combine(structure_of(None), frozen, {path: x + 0.5 for path, x in trained_in_full(learned, LORA).items()})
        _, reference = jax.jit(plain_logprobs)(base, put_batch(batch, ONE))
    section = DPO.model_copy(update={"sft_weight": 0.0})
    # Experts that the model chooses nowhere, and those of the second layer that it always chooses among.
    experts = np.concatenate([np.full((*batch.tokens.shape, 2), 255), np.tile(np.arange(4), (*batch.tokens.shape, 1))], axis=-1)
    of_base = {"reference": np.asarray(reference), "reference_experts": experts[..., [0, 1, 2, 3]].astype(np.uint8)}
    stored = gradients(preference(section), ONE, rows=batch._replace(**of_base))
    drift = stored.terms.metrics[DRIFT_METRIC]
    assert drift.sum[0] == drift.weight == 2 * (batch.segment_ids != 0).sum() and 0 < drift.sum[1] < drift.weight
    with jax.set_mesh(ONE):
        model = combine(structure_of(None), random_parameters(MODEL, scale=0.3), {})
        value = jax.jit(lambda *xs: plain_loss(section, *xs))(model, base, put_batch(batch, ONE))
    assert stored.loss == pytest.approx(float(value), rel=2e-5)
    missing = gradients(preference(section), ONE, rows=batch._replace(reference=np.full_like(batch.reference, np.nan)))
    assert np.isnan(missing.loss)
