"""TRL's generalized Jensen-Shannon divergence (GKD), on the same logits: values and gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_train.machine.mesh import put_batch
from moe_train.train.objectives.distillation import loss
from moe_train.train.objectives.objective import ObjectiveInputs
from tests.train.objectives.test_distillation import SECTIONS, TEACHER, rows, section
from tests.train.tiny_step import ONE, B, T, V, batch

pytestmark = pytest.mark.judges
gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer", reason="trl is not installed")
torch = pytest.importorskip("torch")

EVERY = {
    **{name: objective for name, objective in SECTIONS.items() if objective.top_k == V},
    "js, half": section(divergence="js"),
    "js, near reverse": section(divergence="js", js_beta=0.9, temperature=0.7),
    "forward, squared temperature": section(temperature=3.0, times_squared_temperature=True),
}
BETA = {"forward": 0.0, "reverse": 1.0}


class Logits:
    """A model whose hidden states are its logits."""

    def __init__(self, hidden: Any) -> None:
        self.hidden = hidden

    def __call__(self, *_: Any) -> tuple[Any, None]:
        return self.hidden, None

    def head_weight(self) -> Any:
        return jnp.eye(V)

    def head_lora_factors(self, *_: Any) -> None:
        return None


@pytest.mark.parametrize("name", EVERY)
def test_losses_and_gradients_are_those_of_trl(name: str) -> None:
    objective = EVERY[name]
    student = np.random.default_rng(3).normal(size=(B, T, V)).astype(np.float32)
    plain = batch()
    theirs = torch.tensor(student, requires_grad=True)
    value = gkd.GKDTrainer.generalized_jsd_loss(
        theirs,
        torch.tensor(TEACHER, dtype=torch.float32),
        labels=torch.tensor(np.where(plain.loss_mask, plain.targets, -100).astype(np.int64)),
        beta=BETA.get(objective.divergence, objective.beta),
        temperature=objective.temperature,
    )
    value.backward()
    # TRL does not multiply by the squared temperature.
    factor = objective.temperature**2 if objective.times_squared_temperature else 1.0

    def total(hidden: Any, batch: Any) -> Any:
        terms = loss(objective, ObjectiveInputs(Logits(hidden), batch), None)  # type: ignore[arg-type]
        return terms.sum / jnp.sum(batch.loss_mask)

    # float32 log-probabilities here, since the judged formula has no rounding of what is stored.
    stored = rows(objective)
    exact = TEACHER / objective.temperature
    exact = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    stored = stored._replace(teacher_logprobs=np.take_along_axis(exact, stored.teacher_ids, -1).astype(np.float32))
    with jax.set_mesh(ONE):
        ours, gradient = jax.device_get(jax.jit(jax.value_and_grad(total))(jnp.asarray(student), put_batch(stored, ONE)))
    assert ours == pytest.approx(factor * value.item(), rel=1e-5)
    expected = factor * theirs.grad.numpy()
    assert np.max(np.abs(gradient - expected)) <= 1e-4 * np.max(np.abs(expected))
