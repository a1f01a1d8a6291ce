"""Distillation against a plain reference on all logits: TRL's generalized Jensen-Shannon divergence, with and without a tail."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_train import config
from moe_train.data.batches.distillation_batch import distillation_batch
from moe_train.train.objectives.distillation import distillation, divergence, teacher_outcomes
from tests.train.tiny_step import MESHES, B, T, V, batch, check_equal, gradients, plain_gradients

TEACHER = np.random.default_rng(7).normal(scale=2.0, size=(B, T, V))
"""Logits of a teacher that has nothing to do with the student."""


def section(top_k: int = V, **settings: Any) -> config.Distillation:
    return config.Distillation(name="distillation", top_k=top_k, **settings)


def rows(objective: config.Distillation) -> Any:
    """The tiny batch with a teacher's most likely tokens where something is trained on."""
    plain = batch()
    tempered = TEACHER / objective.temperature
    logprobs = tempered - np.log(np.exp(tempered).sum(-1, keepdims=True))
    ids = np.argsort(-logprobs, axis=-1)
    rest = np.take_along_axis(logprobs, ids[..., objective.top_k :], -1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.exp(rest).sum(-1)).astype(np.float32)
    ids = ids[..., : objective.top_k].astype(np.int32)
    top = np.take_along_axis(logprobs, ids, -1).astype(np.float16)
    trained = plain.loss_mask[..., None]
    # What is not trained on may hold anything.
    arrays = (np.where(trained, ids, 0), np.where(trained, top, 0), np.where(plain.loss_mask, tail, 0))
    return distillation_batch(objective.top_k, objective.temperature)(*plain, *arrays)


def reference(objective: config.Distillation, student_logits: Any, targets: Any) -> Any:
    """The loss of each token in float64, by the formulas of GKD on k tokens and the rest."""
    student = jax.nn.log_softmax(student_logits / objective.temperature)
    stored = rows(objective)
    is_top = jnp.zeros((B, T, V), bool).at[jnp.arange(B)[:, None, None], jnp.arange(T)[:, None], stored.teacher_ids].set(True)
    q = jnp.exp(jnp.take_along_axis(student, jnp.asarray(stored.teacher_ids), -1))
    p = jnp.exp(jnp.asarray(stored.teacher_logprobs, jnp.float32))
    if objective.top_k < V:
        q = jnp.concatenate([q, jnp.sum(jnp.where(is_top, 0, jnp.exp(student)), -1, keepdims=True)], -1)
        p = jnp.concatenate([p, jnp.exp(jnp.asarray(stored.teacher_tail))[..., None]], -1)
    p = p / p.sum(-1, keepdims=True)
    kl = lambda a, b: jnp.sum(a * (jnp.log(a) - jnp.log(b)), -1)  # noqa: E731
    beta = objective.beta
    mixture = beta * p + (1 - beta) * q
    value = {"forward": kl(p, q), "reverse": kl(q, p), "js": beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)}
    total = value[objective.divergence]
    if objective.times_squared_temperature:
        total = total * objective.temperature**2
    at_target = jnp.sum(jnp.where(targets[..., None] == jnp.arange(V), jax.nn.log_softmax(student_logits), 0), -1)
    return total - objective.ce_weight * at_target


SECTIONS = {
    "forward, whole vocabulary": section(temperature=2.0),
    "reverse, whole vocabulary": section(divergence="reverse"),
    "js, whole vocabulary": section(divergence="js", js_beta=0.1, temperature=2.0),
    "forward, top 5": section(5, ce_weight=0.3, temperature=1.5, times_squared_temperature=True),
    "reverse, top 5": section(5, divergence="reverse", ce_weight=0.5),
    "js, top 1": section(1, divergence="js"),
}


QUICK = ("forward, top 5", "js, whole vocabulary")
"""Sections that every run of the tests takes; `--slow` takes the others too."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SECTIONS])
def test_values_and_gradients_equal_all_logits_at_once(name: str) -> None:
    """On one device; the last of them on a mesh, with microbatches, too."""
    objective = SECTIONS[name]

    def plain(model: Any, _: Any, batch: Any) -> jax.Array:
        hidden, _ = model(batch.tokens, batch.positions, batch.segment_ids)
        losses = reference(objective, model.logits(hidden), batch.targets)
        return jnp.sum(jnp.where(batch.loss_mask, losses, 0)) / jnp.sum(batch.loss_mask)

    expected = plain_gradients(plain)
    meshes = [("one device", 1)]
    if name in QUICK:
        meshes.append(("data, fsdp, tensor", 2))
    for mesh, microbatches in meshes:
        found = gradients(distillation(objective), MESHES[mesh], microbatches, rows=rows(objective))
        check_equal(found, expected, 1e-4)
        metrics = {metric: value.sum / value.weight for metric, value in found.terms.metrics.items()}
        assert set(metrics) == {"divergence", "cross_entropy", "entropy", "teacher_mass", "student_mass", "agreement"}
        assert 0 <= metrics["agreement"] <= 1 and 0 < metrics["student_mass"] <= 1 + 1e-5
        assert (metrics["teacher_mass"] > 0.999) == (objective.top_k == V)


def test_a_student_like_its_teacher_has_no_divergence() -> None:
    """Whatever is stored, and however it is rounded."""
    for objective in SECTIONS.values():
        stored = rows(objective)
        teacher = teacher_outcomes(jnp.asarray(stored.teacher_logprobs), jnp.asarray(stored.teacher_tail), objective.top_k < V)
        np.testing.assert_allclose(divergence(objective, teacher, teacher), 0, atol=1e-6)


def test_a_teacher_without_a_tail_leaves_no_infinity() -> None:
    """Reverse and js compare with a tail that has no mass."""
    objective = section(1, divergence="reverse")
    teacher = teacher_outcomes(jnp.zeros((1, 1, 1), jnp.float16), jnp.full((1, 1), -jnp.inf), True)
    value = divergence(objective, teacher, jnp.log(jnp.array([[[0.9, 0.1]]])))
    assert 0 < float(value[0, 0]) < 15


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match="js_beta has no effect on divergence forward"):
        section(js_beta=0.3)
    with pytest.raises(ValueError, match="times_squared_temperature has no effect at temperature 1"):
        section(times_squared_temperature=True)
