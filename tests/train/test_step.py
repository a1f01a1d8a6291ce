"""One optimizer step: the loss it minimises, microbatches, what a step that is not finite changes, adapters."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_train.data.batches.batch import Batch
from moe_train.machine.mesh import put_batch
from moe_train.model.parameters import combine
from moe_train.model.paths import ParameterPath
from moe_train.train.step import _known_after, compile_step
from tests.train.biased_step import FOUR, LORA, ONE, OPTIMIZER, POISON, B, T, V, batch, close, definition, started, step


def test_the_loss_is_that_of_the_whole_step() -> None:
    """Cross-entropy over all loss-bearing tokens; the routers' losses of each microbatch, averaged; AdamW on the gradient."""
    microbatches, whole = 2, batch()
    structure, state = started(ONE)

    @jax.jit
    def expected(params: Any, batch: Batch) -> Any:
        def loss(params: Any) -> Any:
            shares = []
            for j in range(microbatches):  # rows j, j + 2, …
                part = Batch(*(x[j::microbatches] for x in batch))
                hidden, routers = combine(structure, params, state.buffers)(part.tokens, part.positions, part.segment_ids)
                log_probs = jax.nn.log_softmax(jnp.einsum("BTD,VD->BTV", hidden, jax.sharding.reshard(params["head.weight"], P())))
                at_target = jnp.sum(log_probs * (part.targets[..., None] == jnp.arange(V)), axis=-1)
                routers_loss = 0.5 * jnp.sum(routers.load_balance_loss) + 0.1 * jnp.sum(routers.router_z_loss)
                shares.append(-jnp.sum(at_target * part.loss_mask) / jnp.sum(batch.loss_mask) + routers_loss / microbatches)
            return sum(shares)

        value, grads = jax.value_and_grad(loss)(params)
        updates, _ = OPTIMIZER.update(grads, state.opt_state, params)
        return value, optax.tree.norm(grads), optax.apply_updates(params, updates)

    with jax.set_mesh(ONE):
        value, norm, params = jax.device_get(expected(state.trainable, put_batch(whole, ONE)))
    after, metrics = step(whole, ONE, microbatches)
    assert metrics.loss == pytest.approx(value, rel=1e-5)
    assert metrics.grad_norm == pytest.approx(norm, rel=1e-4)
    assert metrics.objective["loss_tokens"] == whole.loss_mask.sum() and metrics.finite and after.step == 1 and after.skipped == 0
    close(after.trainable, params)


def test_cross_entropy_does_not_depend_on_the_split() -> None:
    """Microbatches of unlike numbers of loss-bearing tokens weigh what they hold."""
    assert batch().loss_mask[::2].sum() != batch().loss_mask[1::2].sum()
    (_, whole), (_, split) = step(batch(), ONE, 1), step(batch(), ONE, 2)
    assert split.objective["cross_entropy"] == pytest.approx(whole.objective["cross_entropy"], rel=1e-5)
    assert split.routers.dropped.shape == (2,) and not split.routers.dropped.any()
    close(split.routers.load_E, whole.routers.load_E)  # as many tokens in each part, so their mean is the whole's


def test_a_mesh_takes_the_same_step() -> None:
    (after, metrics), (wanted, wanted_metrics) = (step(batch(), mesh, 2) for mesh in (FOUR, ONE))
    close(metrics, wanted_metrics)
    finite = lambda state: {**state.trainable, "embed.weight": state.trainable["embed.weight"][:POISON]}  # noqa: E731
    close(finite(after), finite(wanted))


@pytest.mark.parametrize(("mesh", "microbatches"), [(ONE, 1), (ONE, 2), (FOUR, 2)], ids=["one device", "microbatches", "mesh"])
def test_a_bias_moves_by_the_load_of_the_whole_step(mesh: Mesh, microbatches: int) -> None:
    """Up by the rate where an expert got less than the mean, down where it got more; once, whatever the microbatches."""
    path = "stacks.0.layers.0.ffn.router.bias"
    after, metrics = step(batch(), mesh, microbatches)
    chosen, wanted = metrics.routers.chosen_E, step(batch())[1].routers.chosen_E
    np.testing.assert_array_equal(chosen, wanted)
    assert (chosen.sum(axis=1) == B * (T - 2) * 2).all()
    direction = np.sign(chosen.mean(axis=1, keepdims=True) - chosen)
    assert {*direction.flat} >= {-1, 1} and list(after.buffers) == [path]
    np.testing.assert_allclose(after.buffers[path] - np.asarray(started(mesh)[1].buffers[path]), 0.01 * direction, atol=1e-7)


@pytest.mark.parametrize(("mesh", "microbatches"), [(ONE, 1), (ONE, 2), (FOUR, 2)], ids=["one device", "microbatches", "mesh"])
def test_a_step_that_is_not_finite_changes_nothing(mesh: Mesh, microbatches: int) -> None:
    _, before = started(mesh)
    after, metrics = step(batch(poisoned=True), mesh, microbatches)
    assert not metrics.finite and np.isnan(metrics.loss)
    assert (after.step, after.skipped) == (1, 1)
    for what in ("trainable", "frozen", "buffers", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, what), jax.device_get(getattr(before, what)))
    moved, metrics = step(batch(), mesh, microbatches)
    assert metrics.finite and (moved.step, moved.skipped) == (1, 0)
    assert all((x != np.asarray(before.trainable[path])).any() for path, x in moved.trainable.items())


def test_moments_are_overwritten_in_place() -> None:
    """XLA:CPU copies what it overwrites while another loop may still read it, and stores what two loops need."""
    with jax.set_mesh(ONE):
        program = compile_step(definition(ONE, 1), started(ONE)[1], put_batch(batch(), ONE)).as_text()
    paths = re.findall(r"%state_opt_state\w*__mu__(\w+)\.\d+ = ", program)
    assert paths
    assert not re.search(r"copy\(%state_opt_state\w*__[mn]u__", program)
    loops = [line for line in program.splitlines() if " fusion(" in line]
    for path in paths:
        # The loop of the weights computes the new moments from the old ones for itself.
        parts = (f"state_trainable__{path}", f"__mu__{path}", f"__nu__{path}")
        assert any(all(part in line for part in parts) for line in loops), path


@pytest.mark.parametrize("applies", [True, False])
def test_moments_follow_the_decision_whatever_the_weights_are(applies: bool) -> None:
    weights = {"w": jnp.array([[jnp.nan, 1.0]]), "v": jnp.array([jnp.inf]), "u": jnp.array(-jnp.inf, jnp.bfloat16)}
    with jax.set_mesh(ONE):
        assert jax.jit(_known_after)(jnp.array(applies), weights) == applies


def test_a_step_without_any_loss_is_finite() -> None:
    after, metrics = step(batch(loss=False))
    assert metrics.finite and metrics.objective["loss_tokens"] == 0 and metrics.objective["cross_entropy"] == 0
    assert metrics.loss > 0  # the routers' losses
    assert after.skipped == 0


def test_adapters_alone_are_trained() -> None:
    _, before = started(FOUR, LORA)
    after, metrics = step(batch(), FOUR, 1, LORA)
    assert metrics.finite
    assert after.trainable and all(ParameterPath.parse(path).is_adapter for path in after.trainable)
    assert not any(ParameterPath.parse(path).is_adapter for path in after.frozen)
    assert len(after.trainable) + len(after.frozen) == len(started(ONE)[1].learned) + 4
    assert not after.buffers  # of a router that is frozen
    jax.tree.map(np.testing.assert_array_equal, after.frozen, jax.device_get(before.frozen))
    assert all((x != np.asarray(before.trainable[path])).any() for path, x in after.trainable.items())
