"""The sparse feed-forward layer: a router and its experts (Mixtral, arXiv:2401.04088). Global view.

Router in float32: logits, the top-k of them, softmax over the chosen. `dispatch` runs the experts.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from moe_train import config
from moe_train.model.dispatch import ExpertMatrix, ExpertWeights, run_experts, top_k
from moe_train.model.fsdp import activation_spec
from moe_train.model.layers import normal


class RouterStats(NamedTuple):
    """What a layer's router did with the tokens that are no padding; stacked on layers as (L, …)."""

    load_E: Array
    """Share of the assignments that each expert got; sums to 1."""
    load_balance_loss: Array
    """E * sum_e load_e * mean router probability of e; 1 where balanced (Switch, arXiv:2101.03961, eq. 4)."""
    router_z_loss: Array
    """Mean squared log-sum-exp of the logits (ST-MoE, arXiv:2202.08906, eq. 5)."""
    entropy: Array
    """Mean entropy of the router's distribution over all experts, in nats; log E where undecided."""
    dropped: Array
    """Assignments that no expert computed."""


class ExpertLinear(nnx.Module):
    """The same linear map for each expert, with its own weight (E, in, out); `model.lora` puts adapters beside it."""

    def __init__(self, rngs: nnx.Rngs, shape: tuple[int, int, int], spec: P, stddev: float, dtype: jnp.dtype):
        self.weight = normal(rngs, shape, spec, stddev, dtype)
        self.lora_a: nnx.Param | None = nnx.data(None)
        self.lora_b: nnx.Param | None = nnx.data(None)
        self.lora_scale = 0.0

    def matrix(self) -> ExpertMatrix:
        a, b = (None if p is None else p[...] for p in (self.lora_a, self.lora_b))
        return ExpertMatrix(self.weight[...], a, b, self.lora_scale)


class Router(nnx.Module):
    """Scores of all experts for each token, (D, E)."""

    def __init__(self, rngs: nnx.Rngs, dim: int, num_experts: int, stddev: float, dtype: jnp.dtype):
        self.weight = normal(rngs, (dim, num_experts), P(None, None), stddev, dtype)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        # float32 in earnest: a TPU would round the operands of a default product to bfloat16
        x, w = x_BTD.astype(jnp.float32), self.weight[...].astype(jnp.float32)
        return jnp.einsum("BTD,DE->BTE", x, w, precision=jax.lax.Precision.HIGHEST, out_sharding=activation_spec("BTE"))


class MoE(nnx.Module):
    """Router, experts, weighted sum. Padding (segment 0) is neither routed nor counted."""

    def __init__(self, rngs: nnx.Rngs, model: config.Model, compute: config.Compute):
        ffn, D, std, dtype = model.ffn, model.model_dim, model.init_stddev, jnp.dtype(compute.param_dtype)
        assert isinstance(ffn, config.MoeFfn)
        E, F = ffn.num_experts, ffn.ffn_dim
        self.router = Router(rngs, D, E, std, dtype)
        self.gate_proj = ExpertLinear(rngs, (E, D, F), P("expert", "fsdp", "tensor"), std, dtype)
        self.up_proj = ExpertLinear(rngs, (E, D, F), P("expert", "fsdp", "tensor"), std, dtype)
        self.down_proj = ExpertLinear(rngs, (E, F, D), P("expert", "tensor", "fsdp"), std, dtype)
        self.experts_per_token, self.kernel = ffn.experts_per_token, compute.grouped_matmul

    def __call__(
        self, x_BTD: Float[Array, "B T D"], segment_ids_BT: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        valid_BT = segment_ids_BT != 0
        logits_BTE = checkpoint_name(self.router(x_BTD), "routing")
        chosen_BTA, ids_BTA = (checkpoint_name(x, "routing") for x in top_k(logits_BTE, self.experts_per_token))
        weights_BTA = jax.nn.softmax(chosen_BTA, axis=-1)
        experts = ExpertWeights(self.gate_proj.matrix(), self.up_proj.matrix(), self.down_proj.matrix())
        y_BTD, computed = run_experts(x_BTD, ids_BTA, weights_BTA, valid_BT, experts, self.kernel)
        return y_BTD, router_stats(logits_BTE, ids_BTA, valid_BT, computed)


def router_stats(
    logits_BTE: Float[Array, "B T E"], expert_ids_BTA: Int[Array, "B T A"], valid_BT: Bool[Array, "B T"], computed: Array
) -> RouterStats:
    """Losses and figures of one layer, over the whole mesh."""
    E, A = logits_BTE.shape[-1], expert_ids_BTA.shape[-1]
    count = jnp.sum(valid_BT)
    tokens = jnp.maximum(count, 1).astype(jnp.float32)
    chosen_BTE = jnp.sum(expert_ids_BTA[..., None] == jnp.arange(E), axis=2) * valid_BT[..., None]
    load_E = jnp.sum(chosen_BTE, axis=(0, 1)) / (tokens * A)
    lse_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
    log_probs_BTE = logits_BTE - lse_BT[..., None]
    probs_BTE = jnp.exp(log_probs_BTE)
    mean_probs_E = jnp.sum(probs_BTE * valid_BT[..., None], axis=(0, 1)) / tokens
    return RouterStats(
        load_E=load_E,
        load_balance_loss=E * jnp.sum(jax.lax.stop_gradient(load_E) * mean_probs_E),
        router_z_loss=jnp.sum(jnp.square(lse_BT) * valid_BT) / tokens,
        entropy=-jnp.sum(probs_BTE * log_probs_BTE * valid_BT[..., None]) / tokens,
        dropped=count * A - computed,
    )
