"""The router: it scores experts for each token, selects among them, and keeps statistics of the selection."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key

from moe_train.machine.mesh import batch_axes
from moe_train.model.layers import Adapted, RandomSource, normal
from moe_train.model.outer_products import is_faster_transposed
from moe_train.model.sharding.specs import activation_spec, sum_over_replicas


class RouterStats(NamedTuple):
    """Statistics of one layer's router over all tokens except padding; stacked over layers as (L, …)."""

    chosen_E: Int[Array, "*L E"]
    """Number of assignments the router made to each expert (int32), before any is dropped."""
    load_balance_loss: Float[Array, "*L"]
    """E * sum_e load_e * mean router probability of e; 1 if balanced (Switch, arXiv:2101.03961, eq. 4).

    Loads and probabilities are those of all tokens, or of each row of the batch by itself, the losses of the rows being averaged
    over their tokens (DeepSeek-V3, arXiv:2412.19437, eq. 17), if `MoE.balances_rows` is set.

    The probabilities of a sigmoid router are its sigmoids divided by their sum (DeepSeek-V3, eq. 19).
    """
    router_z_loss: Float[Array, "*L"]
    """Mean squared log-sum-exp of the logits (ST-MoE, arXiv:2202.08906, eq. 5)."""
    entropy: Float[Array, "*L"]
    """Mean entropy, in nats, of the router's distribution over all experts; log E if uniform."""
    dropped: Int[Array, "*L"]
    """Number of assignments of valid tokens that no expert computed."""
    mean_probability_E: Float[Array, "*L E"] | None = None
    """Mean router probability of each expert, the differentiable factor of the balance loss."""
    expert_ids: Int[Array, "*L B T A"] | None = None
    """Chosen experts (B, T, A), if `MoE.keeps_expert_ids` is set; otherwise None."""

    @property
    def load_E(self) -> Any:
        """Fraction of the assignments that each expert got; sums to 1."""
        total = self.chosen_E.sum(axis=-1, keepdims=True)
        # Without any token the loads are 0 and not NaN.
        return self.chosen_E / (total + (total == 0))


def balance_loss(load_E: Float[Array, "*L E"], mean_probability_E: Float[Array, "*L E"]) -> Float[Array, "*L"]:
    """Return E * sum_e load_e * mean router probability of e, through whose second factor the gradient flows."""
    return load_E.shape[-1] * jnp.sum(load_E * mean_probability_E, axis=-1)


def merge_microbatches(stats: RouterStats, over_step: bool = False) -> RouterStats:
    """Merge the statistics of the microbatches of a step: sum the counts, and average the means over all tokens.

    Args:
        stats: the statistics, stacked on dim 0.
        over_step: whether the balance loss is that of the loads of the whole step, and not the mean of those of microbatches.
    """
    assert stats.mean_probability_E is not None
    assignments_ML = jnp.sum(stats.chosen_E, axis=-1)
    # A microbatch of padding only has no assignments, and so no weight; a step of padding only gives zeros.
    weights_ML = assignments_ML / jnp.maximum(jnp.sum(assignments_ML, axis=0), 1)

    def mean(x: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.sum(weights_ML * x, axis=0)

    mean_probability_E = jnp.sum(weights_ML[..., None] * stats.mean_probability_E, axis=0)
    merged = RouterStats(
        chosen_E=jnp.sum(stats.chosen_E, axis=0),
        load_balance_loss=mean(stats.load_balance_loss),
        router_z_loss=mean(stats.router_z_loss),
        entropy=mean(stats.entropy),
        dropped=jnp.sum(stats.dropped, axis=0),
        mean_probability_E=mean_probability_E,
    )
    if over_step:
        merged = merged._replace(load_balance_loss=balance_loss(merged.load_E, mean_probability_E))
    return merged


class Router(Adapted):
    """Linear map (D, E) that scores all experts for each token.

    `bias` (E,) is float32, or None; see `config.SoftmaxRouter`.
    """

    def __init__(self, rngs: RandomSource, dim: int, num_experts: int, stddev: float, dtype: jnp.dtype, bias: bool = False):
        # Replicated: it is small, and every token needs all of it.
        super().__init__(normal(rngs, (dim, num_experts), P(None, None), stddev, dtype))
        self.bias: nnx.Param | None = nnx.data(None)
        if bias:
            self.bias = nnx.Param(jnp.zeros((num_experts,), jnp.float32, out_sharding=P(None)))

    def __call__(self, x_BTD: Float[Array, "B T D"], key: Key[Array, ""] | None = None) -> Float[Array, "B T E"]:
        """Return the logits in float32.

        Args:
            x_BTD: hidden states.
            key: PRNG key for the dropout on the adapter's input; None for no dropout.
        """
        x_BTD = x_BTD.astype(jnp.float32)
        logits_BTE = _float32_product("BTD,DE->BTE", x_BTD, self.weight[...])
        adapter = self.adapter()
        if adapter is not None:
            a_DJ, b_JE = adapter
            low_rank_BTJ = _float32_product("BTD,DJ->BTJ", self.apply_dropout(x_BTD, key), a_DJ)
            logits_BTE += _float32_product("BTJ,JE->BTE", low_rank_BTJ, b_JE)
        return logits_BTE


def _float32_product(equation: str, x: Float[Array, "..."], w: Float[Array, "..."]) -> Float[Array, "..."]:
    """Compute a product in full float32 precision; by default a TPU would round the operands to bfloat16."""
    operands, y_letters = equation.split("->")
    w = w.astype(jnp.float32)
    if is_faster_transposed(*w.shape):
        # Its gradient is then computed as that of the transpose, too; the barrier keeps XLA from swapping the operands back.
        x_letters, w_letters = operands.split(",")
        equation = f"{x_letters},{w_letters[::-1]}->{y_letters}"
        w = jax.lax.optimization_barrier(w.T)
    return jnp.einsum(equation, x, w, precision=jax.lax.Precision.HIGHEST, out_sharding=activation_spec(y_letters))


def next_bias(bias_E: Float[Array, "*L E"], chosen_E: Int[Array, "*L E"], rate: float) -> Float[Array, "*L E"]:
    """Return the router bias after a step: b_e + rate * sign(mean load - load of e).

    See arXiv:2408.15664, algorithm 1.

    Args:
        bias_E: bias before the step; may have leading dims of layers.
        chosen_E: assignments of the whole step to each expert.
        rate: size of the update.
    """
    mean = jnp.mean(chosen_E.astype(jnp.float32), axis=-1, keepdims=True)
    return bias_E + rate * jnp.sign(mean - chosen_E)


def top_k(
    logits_BTE: Float[Array, "B T *G E"], k: int, selection_BTE: Float[Array, "B T *G E"] | None = None
) -> tuple[Float[Array, "B T *G k"], Int[Array, "B T *G k"]]:
    """Return the k selected values of each token and their indices.

    The selection runs where the token is, in a `shard_map`: otherwise XLA:CPU gathers the whole batch.

    Args:
        logits_BTE: values to select from, on the last dim.
        k: number of values per token.
        selection_BTE: select the k entries where this is largest; it gets no gradient. None to select by `logits_BTE`.
    """
    tokens = P(batch_axes(), "context")

    def local(
        logits_btE: Float[Array, "b t *G E"], selection_btE: Float[Array, "b t *G E"] | None
    ) -> tuple[Float[Array, "b t *G k"], Int[Array, "b t *G k"]]:
        if selection_btE is None:
            values, ids = jax.lax.top_k(logits_btE, k)
            return values, ids
        # Experts are selected by their selection scores but weighted by their logits, through which the gradient flows.
        _, ids = jax.lax.top_k(jax.lax.stop_gradient(selection_btE), k)
        return jnp.take_along_axis(logits_btE, ids, axis=-1), ids

    return jax.shard_map(local, in_specs=tokens, out_specs=(tokens, tokens))(logits_BTE, selection_BTE)


def within_groups(selection_BTE: Float[Array, "B T E"], num_groups: int, groups_per_token: int) -> Float[Array, "B T E"]:
    """Set the selection scores of experts outside the token's groups to minus infinity.

    A token keeps the `groups_per_token` groups whose two best experts have the largest sum of scores.

    Args:
        selection_BTE: selection scores.
        num_groups: number of equal groups that the experts are divided into, in order.
        groups_per_token: number of groups that a token keeps.
    """
    B, T, E = selection_BTE.shape
    best_BTG2, _ = top_k(selection_BTE.reshape(B, T, num_groups, -1), 2)
    _, groups_BTg = top_k(jnp.sum(best_BTG2, axis=-1), groups_per_token)
    # (B, T, g, 1) against the group of each expert, (E,).
    within_BTE = jnp.any(groups_BTg[..., None] == jnp.arange(E) // (E // num_groups), axis=2)
    return jnp.where(within_BTE, selection_BTE, -jnp.inf)


def router_stats(
    logits_BTE: Float[Array, "B T E"],
    log_scores_BTE: Float[Array, "B T E"],
    expert_ids_BTA: Int[Array, "B T A"],
    valid_BT: Bool[Array, "B T"],
    computed: Int[Array, ""],
    balances_rows: bool = False,
) -> RouterStats:
    """Compute the losses and metrics of one layer's router over the whole mesh.

    Args:
        logits_BTE: router logits.
        log_scores_BTE: the softmax of these is a token's probabilities.
        expert_ids_BTA: chosen experts.
        valid_BT: False for padding.
        computed: number of assignments that experts computed, before the sum over replicas.
        balances_rows: whether the balance loss is that of each row instead of all tokens.
    """
    E = logits_BTE.shape[-1]
    A = expert_ids_BTA.shape[-1]
    chosen_BTE = jnp.sum(expert_ids_BTA[..., None] == jnp.arange(E), axis=2) * valid_BT[..., None]
    lse_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
    log_probs_BTE = jax.nn.log_softmax(log_scores_BTE)
    probs_BTE = jnp.exp(log_probs_BTE)
    # Sums are reduced before means are taken, since replicas may have different numbers of valid tokens.
    count, chosen_E, probs_E, squares, entropy, computed = sum_over_replicas(
        (
            jnp.sum(valid_BT),
            jnp.sum(chosen_BTE, axis=(0, 1), dtype=jnp.int32),
            jnp.sum(probs_BTE * valid_BT[..., None], axis=(0, 1)),
            jnp.sum(jnp.square(lse_BT) * valid_BT),
            -jnp.sum(probs_BTE * log_probs_BTE * valid_BT[..., None]),
            computed,
        )
    )
    # A batch of padding only gives zeros and not NaN.
    tokens = jnp.maximum(count, 1).astype(jnp.float32)
    mean_probability_E = probs_E / tokens
    if balances_rows:
        load_balance_loss = sum_over_replicas(_row_losses(chosen_BTE, probs_BTE * valid_BT[..., None], A)) / tokens
    else:
        load_balance_loss = balance_loss(chosen_E / (tokens * A), mean_probability_E)
    return RouterStats(
        chosen_E=chosen_E,
        load_balance_loss=load_balance_loss,
        router_z_loss=squares / tokens,
        entropy=entropy / tokens,
        dropped=count * A - computed,
        mean_probability_E=mean_probability_E,
    )


def _row_losses(chosen_BTE: Int[Array, "B T E"], probs_BTE: Float[Array, "B T E"], experts_per_token: int) -> Float[Array, ""]:
    """Return the sum over rows of (number of tokens * balance loss of the row), with zeros at padding in both arguments."""
    chosen_BE = jnp.sum(chosen_BTE, axis=1)
    # Without any token a row has loads and probabilities of 0, and so no loss.
    tokens_B = jnp.sum(chosen_BE, axis=-1) / experts_per_token
    safe_B1 = jnp.maximum(tokens_B, 1)[:, None]
    losses_B = balance_loss(chosen_BE / (safe_B1 * experts_per_token), jnp.sum(probs_BTE, axis=1) / safe_B1)
    return jnp.sum(tokens_B * losses_B)
