"""The sparse feed-forward layer: a router, its routed experts, and shared experts that all tokens use. Global view.

The router computes logits in float32, takes the top-k, and applies a softmax over the chosen ones (Mixtral,
arXiv:2401.04088). A sigmoid router (DeepSeek-V3, arXiv:2412.19437) weights its experts by sigmoid_i / sum of the chosen
sigmoids, which equals the softmax over the logarithms of the chosen sigmoids; so both are a softmax over `log_scores`.
`experts` runs the chosen experts.
"""

from __future__ import annotations

from typing import assert_never

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from moe_train import config
from moe_train.machine.mesh import is_one_device
from moe_train.model.ffn import DenseFfn
from moe_train.model.layers import Adapted, RandomSource, keys_of, normal
from moe_train.model.moe.expert_weights import ExpertMatrix, ExpertWeights, InStack, SeparateExperts
from moe_train.model.moe.experts import Dropout, ExpertSettings, Routing, cast_experts, run_experts
from moe_train.model.moe.grouped_matmul import choose_grouped_matmul_kernel
from moe_train.model.moe.router import Router, RouterStats, router_stats, top_k, within_groups
from moe_train.model.quantize import QuantizedWeight


class ExpertLinear(Adapted):
    """The same linear map for every expert, with a weight (E, in, out) and an optional adapter per expert."""

    summed_dim = -2
    """Weight dim that the product sums over, as `Linear.summed_dim`."""

    def __init__(self, rngs: RandomSource, shape: tuple[int, int, int], spec: P, stddev: float, dtype: jnp.dtype):
        super().__init__(normal(rngs, shape, spec, stddev, dtype))
        self.in_stack: InStack | None = nnx.data(None)
        """The weight where it is read in the stack of all layers (`MoE.read_in_stack`)."""

    def matrix(self) -> ExpertMatrix:
        """Return the weight and the LoRA factors, None without an adapter."""
        return ExpertMatrix(self.in_stack or self.weight[...], *(self.adapter() or (None, None)))


class MoE(nnx.Module):
    """Router, experts and weighted sum. Padding (segment 0) is neither routed nor counted."""

    def __init__(self, rngs: RandomSource, model: config.Model, compute: config.Compute, ffn: config.MoeFfn):
        D = model.model_dim
        E = ffn.num_experts
        F = ffn.ffn_dim
        std = model.init_stddev
        dtype = jnp.dtype(compute.param_dtype)
        self.router = Router(rngs, D, E, std, dtype, ffn.router.bias)
        self.gate_proj = ExpertLinear(rngs, (E, D, F), P("expert", "fsdp", "tensor"), std, dtype)
        self.up_proj = ExpertLinear(rngs, (E, D, F), P("expert", "fsdp", "tensor"), std, dtype)
        self.down_proj = ExpertLinear(rngs, (E, F, D), P("expert", "tensor", "fsdp"), std, dtype)
        self.separate_experts: SeparateExperts | None = nnx.data(None)
        """The weights of the experts where they are separate arrays; the three stacks are empty then (`separate_layers`)."""
        self.shared: DenseFfn | None = nnx.data(None)
        if ffn.num_shared_experts:
            # Several shared experts are one SwiGLU of their joint width, as in the files of Mistral and DeepSeek.
            self.shared = DenseFfn(rngs, model, compute, ffn.num_shared_experts * F)
        self.experts_per_token = ffn.experts_per_token
        self.kernel = compute.grouped_matmul
        self.transport = compute.transport
        match ffn.router:
            case config.SoftmaxRouter(scale=scale):
                self.sigmoid = False
                self.scale = scale
                self.groups = (1, 1)
            case config.SigmoidRouter(scale=scale, num_groups=num_groups, groups_per_token=groups_per_token):
                self.sigmoid = True
                self.scale = scale
                self.groups = (num_groups, groups_per_token)
            case _:
                assert_never(ffn.router)
        self.keeps_expert_ids = False
        self.balances_rows = False
        """Whether the balance loss is that of each row; set in training (`parameters.with_row_balance`)."""
        self.capacity_factor: float | None = None
        """Capacity factor; set in training only (`parameters.with_capacity`): evaluation and generation drop nothing."""

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        segment_ids_BT: Int[Array, "B T"],
        key: Key[Array, ""] | None = None,
        layer_input_BTD: Float[Array, "B T D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """Route each token and sum the outputs of its experts and of the shared experts.

        Args:
            x_BTD: normalized hidden states.
            segment_ids_BT: 0 for padding.
            key: PRNG key for the dropout of the adapters; None for no dropout.
            layer_input_BTD: hidden states that enter the layer, before attention (`cast_experts`); None for x_BTD.

        Returns:
            The output (B, T, D) and the router's statistics.
        """
        router_key, experts_key, shared_key = keys_of(key, 3)
        valid_BT = segment_ids_BT != 0
        logits_BTE = checkpoint_name(self.router(x_BTD, router_key), "routing")
        log_scores_BTE = jax.nn.log_sigmoid(logits_BTE) if self.sigmoid else logits_BTE
        chosen = top_k(log_scores_BTE, self.experts_per_token, self._selection_scores(log_scores_BTE))
        # Remat policy `minimal` saves these names, so that the backward pass need not select experts again.
        chosen_BTA, ids_BTA = (checkpoint_name(x, "routing") for x in chosen)
        weights_BTA = self.scale * jax.nn.softmax(chosen_BTA, axis=-1)
        rates = tuple(m.lora_dropout for m in (self.gate_proj, self.up_proj, self.down_proj))
        dropout = None
        if experts_key is not None and any(rates):
            dropout = Dropout(experts_key, rates)
        settings = ExpertSettings(self.kernel, self.transport, self.capacity_factor)
        experts = self.experts()
        if isinstance(experts, ExpertWeights):
            experts = cast_experts(experts, x_BTD.dtype, x_BTD if layer_input_BTD is None else layer_input_BTD)
        y_BTD, computed = run_experts(x_BTD, Routing(ids_BTA, weights_BTA, valid_BT), experts, settings, dropout)
        if self.shared is not None:
            y_BTD += self.shared(x_BTD, shared_key)
        stats = router_stats(logits_BTE, log_scores_BTE, ids_BTA, valid_BT, computed, self.balances_rows)
        return y_BTD, stats._replace(expert_ids=ids_BTA) if self.keeps_expert_ids else stats

    def read_in_stack(self, stacked: MoE, layer: Int[Array, ""], dtype: jnp.dtype) -> None:
        """Read the weights of the experts in the stack of all layers, where that is possible, and not in this layer's slice.

        It is on one device, whose kernel multiplies by one expert at a time, and for weights that have the compute dtype.

        Args:
            stacked: the layer whose weights are those of all layers.
            layer: index in the stack.
            dtype: compute dtype.
        """
        is_possible = is_one_device() and self.transport in ("auto", "all_gather")
        if not is_possible or choose_grouped_matmul_kernel(self.kernel) != "blocked":
            return
        for own, of_all in zip(self._projections(), stacked._projections(), strict=True):
            if not isinstance(own.weight, QuantizedWeight) and own.weight.dtype == dtype:
                own.in_stack = nnx.data(InStack(jax.lax.stop_gradient(of_all.weight[...]), layer, own.weight[...]))

    def _projections(self) -> tuple[ExpertLinear, ExpertLinear, ExpertLinear]:
        return self.gate_proj, self.up_proj, self.down_proj

    def experts(self) -> ExpertWeights | SeparateExperts:
        """Return the weights of the routed experts."""
        if self.separate_experts is not None:
            return self.separate_experts
        return ExpertWeights(*(projection.matrix() for projection in self._projections()))

    def _selection_scores(self, log_scores_BTE: Float[Array, "B T E"]) -> Float[Array, "B T E"] | None:
        """Selection scores for top-k (probabilities plus router bias, masked by expert group); None to select by router scores."""
        if self.router.bias is None and self.groups == (1, 1):
            return None
        # The bias is added to probabilities (sigmoids), not to logits, as in DeepSeek-V3 (arXiv:2412.19437).
        scores_BTE = jnp.exp(log_scores_BTE if self.sigmoid else jax.nn.log_softmax(log_scores_BTE))
        if self.router.bias is not None:
            scores_BTE += self.router.bias[...]
        return scores_BTE if self.groups == (1, 1) else within_groups(scores_BTE, *self.groups)
